"""Keep the requests of one session on one worker while it is healthy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import FleetView, RequestProfile, Role, Worker


class SessionAffinity:
    """Scores 1 the session's worker, 0 all others; no opinion without a session.

    The worker follows from the session's name by consistent hashing: nothing is remembered, several
    gateways agree, and when a worker falls ill only its own sessions move. Prefill and decode of
    one request get two different workers.
    """

    def __init__(self) -> None:
        self._ring = Ring(())

    @hookimpl
    def disagg_score_workers(
        self,
        profile: RequestProfile,
        role: Role,
        workers: Sequence[Worker],
        fleet: FleetView,
        other: Worker | None,
    ) -> dict[str, float] | None:
        """See ``hookspecs.disagg_score_workers``."""
        if profile.session is None:
            return None
        without = None if other is None else other.name
        chosen = self._worker(profile.session, role, fleet, without)
        if not any(worker.name == chosen for worker in workers):
            return None
        return {worker.name: float(worker.name == chosen) for worker in workers}

    @hookimpl
    def disagg_nominate_workers(
        self, profile: RequestProfile, role: Role, fleet: FleetView
    ) -> list[str] | None:
        """See ``hookspecs.disagg_nominate_workers``."""
        if profile.session is None:
            return None
        first = self._worker(profile.session, role, fleet, None)
        if first is None:
            return None
        second = self._worker(profile.session, role, fleet, first)
        return [first] if second is None else [first, second]

    def _worker(
        self, session: str, role: Role, fleet: FleetView, without: str | None
    ) -> str | None:
        ring = self._ring
        if ring.workers is not fleet.workers:
            ring = self._ring = Ring(fleet.workers)
        for worker in ring.walk(session):
            if worker.name == without or not worker.role.serves(role):
                continue
            if fleet.load(worker).healthy:
                return worker.name
        return None
