"""What one request has of its workers' time: noted with the fleet, given back exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.membership import Members
    from disagg_plugins.gateway.worker_state import Work
    from disagg_plugins.types import Worker


EXPECTED = "expected"
"""The side of a decode worker that is not called yet."""


class Claims:
    """The work that one request has begun, by side.

    A decode worker is counted as ``expected`` from the decision on, while prefill still reads:
    requests that are split at the same time would all choose the same one otherwise.

    Args:
        fleet: Counts the work of all requests; it knows of a work before it is noted here.
    """

    __slots__ = ("_fleet", "_held")

    def __init__(self, fleet: FleetState) -> None:
        self._fleet = fleet
        self._held: dict[str, tuple[str, Work]] = {}

    def note(self, side: str, worker: str, work: Work) -> None:
        """The fleet has counted this work."""
        self._held[side] = (worker, work)

    def expect(self, members: Members, decode: Worker, work: Work) -> None:
        """A decode worker was chosen, and will be called when the prompt is read."""
        _, given = members.give(decode, work)
        self.note(EXPECTED, decode.name, given)

    def worker(self, side: str) -> str | None:
        """Return the worker that works on ``side``, or None."""
        held = self._held.get(side)
        return None if held is None else held[0]

    def prompt_read(self, side: str) -> None:
        """The worker of ``side`` has read the prompt."""
        held = self._held.get(side)
        if held is not None:
            self._held[side] = (held[0], self._fleet.prompt_read(*held))

    def succeeded(self, side: str) -> None:
        """The worker of ``side`` has done its part."""
        if (worker := self.worker(side)) is not None:
            self._fleet.succeeded(worker)
        self.leave(side)

    def rename(self, side: str, to: str) -> None:
        """The worker of ``side`` is that of ``to`` from now on."""
        self._held[to] = self._held.pop(side)

    def leave(self, side: str) -> None:
        """The worker of ``side`` has no more work of this request."""
        held = self._held.pop(side, None)
        if held is not None:
            self._fleet.end(*held)

    def leave_all(self) -> None:
        """No worker has work of this request any more."""
        for side in list(self._held):
            self.leave(side)
