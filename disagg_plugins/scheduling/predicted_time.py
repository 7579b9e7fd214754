"""Prefer the worker that is predicted to be done with its part of the request first.

The rule ``slo`` predicts with the best worker of each role; this scorer makes that worker the one
that is taken. It sees what the other scorers see one by one: the queue, the running answers, what
the prefix cache lacks, and how fast the worker is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.uses_predictor import UsesPredictor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import FleetView, RequestProfile, Role, Worker


class PredictedTime(UsesPredictor):
    """Scores the shortest time over each worker's own; no opinion until all are measured.

    For prefill that is the reading of what the worker's cache lacks, behind what waits. For decode
    it is the writing, and the reading as well: the worker may have to do it, and of what it holds
    nothing has to be moved.
    """

    @hookimpl
    def disagg_score_workers(
        self, profile: RequestProfile, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float] | None:
        """See ``hookspecs.disagg_score_workers``."""
        with self.predictor.lock:
            self.predictor.catch_up()
            times_s = self.predictor.times_s(profile, role, workers, fleet)
        if not times_s:
            return None
        least_s = min(times_s.values())
        return {name: least_s / time_s for name, time_s in times_s.items()}
