"""Keep the requests of one session on one worker while it is healthy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.session_places import SessionPlaces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import FleetView, RequestProfile, Role, Worker


class SessionAffinity:
    """Scores 1 the session's worker, 0 all others; no opinion without a session.

    The worker follows from the session's name by consistent hashing: several gateways agree, and
    when a worker falls ill only its own sessions move. Prefill and decode of one request get two
    different workers. A place is remembered only as long as the same workers take requests.
    """

    def __init__(self) -> None:
        self._places = SessionPlaces()

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
        return self._places.scores(profile.session, role, workers, fleet, other)

    @hookimpl
    def disagg_nominate_workers(
        self, profile: RequestProfile, role: Role, fleet: FleetView
    ) -> Sequence[str] | None:
        """See ``hookspecs.disagg_nominate_workers``."""
        if profile.session is None:
            return None
        return self._places.of(profile.session, role, fleet) or None
