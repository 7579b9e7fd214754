"""Which workers a session belongs to, by consistent hashing (pure).

Apart from the plugin that asks, because it may be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg_plugins.scheduling.ring import Ring

if TYPE_CHECKING:
    from disagg_plugins.types import FleetView, Role, Worker

MAX_PLACES = 4096
"""Sessions of each role whose place is remembered, some 200 bytes each; then all are looked up
anew, each at the cost of a hash and a few steps."""


class SessionPlaces:
    """The places of sessions, remembered as long as the same workers take requests."""

    def __init__(self) -> None:
        self._ring = Ring(())
        self._places: dict[Role, _Places] = {}

    def scores(
        self,
        session: str,
        role: Role,
        workers: Sequence[Worker],
        fleet: FleetView,
        other: Worker | None,
    ) -> dict[str, float] | None:
        """Score 1 the session's worker, 0 all others; None where it is none of ``workers``.

        ``other`` has the other role of the request: the next one stands in for it.
        """
        without = None if other is None else other.name
        scores = {worker.name: 0.0 for worker in workers}
        for name in self.of(session, role, fleet):
            if name != without:
                if name not in scores:
                    return None
                scores[name] = 1.0
                return scores
        return None

    def of(self, session: str, role: Role, fleet: FleetView) -> tuple[str, ...]:
        """Return the worker that a session belongs to and the one that stands in for it."""
        ring = self._ring
        if ring.workers is not fleet.workers:
            ring = self._ring = Ring(fleet.workers)
        if fleet.index is None:  # nothing tells whether the same workers are healthy
            return _two_of(ring, session, role, fleet)
        ready = fleet.index.ready[role]
        places = self._places.get(role)
        if places is None or not places.hold(ring, ready):
            places = self._places[role] = _Places(ring, ready)
        place = places.of.get(session)
        if place is None:
            place = places.of[session] = _two_of(ring, session, role, fleet)
        return place


class _Places:
    """Where sessions belong, for as long as one ring and one list of healthy workers hold."""

    def __init__(self, ring: Ring, ready: Sequence[Worker]) -> None:
        self._ring = ring
        self._ready = ready
        self.of: dict[str, tuple[str, ...]] = {}

    def hold(self, ring: Ring, ready: Sequence[Worker]) -> bool:
        same = self._ring is ring and self._ready is ready
        return same and len(self.of) < MAX_PLACES


def _two_of(ring: Ring, session: str, role: Role, fleet: FleetView) -> tuple[str, ...]:
    """Return the first two healthy workers of a role behind a session's point, or fewer."""
    found: tuple[str, ...] = ()
    for worker in ring.walk(session):
        if worker.name in found or not worker.role.serves(role) or not fleet.load(worker).healthy:
            continue
        found += (worker.name,)
        if len(found) == 2:
            break
    return found
