"""Give no worker more than its capacity, and refuse what nobody can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.worker_scores import with_room
from disagg_plugins.types import FleetView, Refusal, RequestProfile, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

RETRY_UNHEALTHY_S = 5.0
"""A worker that rests comes back with a health probe; a few probe intervals."""

RETRY_FULL_S = 1.0
"""Requests end all the time on a full fleet."""


class Capacity:
    """Refuses a request when no decode worker can take it; leaves out full workers.

    A worker that has just come back is full with one request, until one succeeds there.
    """

    @hookimpl
    def disagg_select_admission(self, profile: RequestProfile, fleet: FleetView) -> Refusal | None:
        """See ``hookspecs.disagg_select_admission``."""
        if fleet.has_room(Role.DECODE):
            return None
        serving = fleet.serving(Role.DECODE)
        if not serving:
            return Refusal("no healthy decode worker", RETRY_UNHEALTHY_S, status=503)
        requests = sum(fleet.load(worker).requests for worker in serving)
        capacity = sum(worker.capacity for worker in serving)
        return Refusal(
            f"all {len(serving)} healthy decode workers are at capacity: {requests} requests in "
            f"flight, {capacity} allowed",
            RETRY_FULL_S,
            status=429,
        )

    @hookimpl
    def disagg_filter_workers(
        self, workers: Sequence[Worker], fleet: FleetView
    ) -> list[Worker] | None:
        """See ``hookspecs.disagg_filter_workers``."""
        return with_room(workers, fleet.loads)
