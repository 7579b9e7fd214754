"""The workers that take requests, by role, kept up to date one worker at a time (sans-IO).

A worker that joins, falls ill, recovers or leaves costs a look into a sorted list, not a look at
every worker; what readers hold are tuples, made anew when somebody looks after a change.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import Worker

PHASES = (Role.PREFILL, Role.DECODE)


@dataclass(slots=True)
class _Listed:
    order: int
    worker: Worker
    has_room: bool
    trial: bool


class RoleLists:
    """Who takes requests of which role.

    Attributes:
        ready: By role, in the order of joining; as of the last ``settle``.
        room: How many of a role have room.
        tried: How many of a role are on trial.
        changed: Roles whose list changed since the last ``settle``.
    """

    def __init__(self) -> None:
        self.ready: dict[Role, Sequence[Worker]] = dict.fromkeys(PHASES, ())
        self.room = dict.fromkeys(PHASES, 0)
        self.tried = dict.fromkeys(PHASES, 0)
        self.changed: set[Role] = set()
        self._orders: dict[Role, list[int]] = {role: [] for role in PHASES}
        self._workers: dict[Role, list[Worker]] = {role: [] for role in PHASES}
        self._listed: dict[str, _Listed] = {}

    def now(self, role: Role) -> Sequence[Worker]:
        """Return who takes requests of a role, changes since ``settle`` included."""
        return self._workers[role]

    def put(self, order: int, worker: Worker, *, has_room: bool, trial: bool) -> None:
        """List a worker that takes requests, or what has changed of it.

        Args:
            order: Its place; no two workers have the same.
            worker: As it is now.
            has_room: Whether it may be given one more request.
            trial: Whether it is on trial.
        """
        old = self._listed.get(worker.name)
        if old is not None and old.order == order and old.worker is worker:
            if has_room != old.has_room or trial != old.trial:
                self._count(self.room, worker, has_room - old.has_room)
                self._count(self.tried, worker, trial - old.trial)
                old.has_room, old.trial = has_room, trial
            return
        self.take(worker.name)
        self._listed[worker.name] = _Listed(order, worker, has_room, trial)
        for role in PHASES:
            if worker.role.serves(role):
                at = bisect_left(self._orders[role], order)
                self._orders[role].insert(at, order)
                self._workers[role].insert(at, worker)
                self.changed.add(role)
        self._count(self.room, worker, has_room)
        self._count(self.tried, worker, trial)

    def take(self, name: str) -> None:
        """A worker takes no requests any more; idempotent."""
        old = self._listed.pop(name, None)
        if old is None:
            return
        for role in PHASES:
            if old.worker.role.serves(role):
                at = bisect_left(self._orders[role], old.order)
                del self._orders[role][at]
                del self._workers[role][at]
                self.changed.add(role)
        self._count(self.room, old.worker, -old.has_room)
        self._count(self.tried, old.worker, -old.trial)

    def settle(self) -> None:
        """Bring ``ready`` up to date."""
        for role in self.changed:
            self.ready[role] = tuple(self._workers[role])
        self.changed.clear()

    def _count(self, counts: dict[Role, int], worker: Worker, step: int) -> None:
        for role in PHASES if step else ():
            if worker.role.serves(role):
                counts[role] += step
