"""Prefer the worker with the least work before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.worker_scores import least_queued, least_requests
from disagg_plugins.types import FleetView, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence


class LeastLoaded:
    """Scores by load; 1 is an idle worker, and more work never scores higher.

    Decoding requests share each step, so decode counts requests against capacity. Reading a prompt
    takes time by its length, so prefill counts the prompt tokens still to be read, then requests.
    """

    @hookimpl
    def disagg_score_workers(
        self, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float]:
        """See ``hookspecs.disagg_score_workers``."""
        score = least_queued if role is Role.PREFILL else least_requests
        return score(workers, fleet.loads)
