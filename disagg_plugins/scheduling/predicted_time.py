"""Prefer the worker that is predicted to be done with its part of the request first.

The rule ``slo`` predicts with the best worker of each role; this scorer makes that worker the one
that is taken. It sees what the other scorers see one by one: the queue, the running answers, what
the prefix cache lacks, and how fast the worker is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.prediction import UsesPredictor, expected_output
from disagg_plugins.scheduling.prefill_slots import behind_queue
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import FleetView, RequestProfile, Worker


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
            times_s = {w.name: self._time_s(profile, role, w, fleet) for w in workers}
        known = [time_s for time_s in times_s.values() if time_s is not None and time_s > 0.0]
        if len(known) < len(times_s):
            return None
        least_s = min(known)
        return {name: least_s / time_s for name, time_s in times_s.items() if time_s}

    def _time_s(
        self, profile: RequestProfile, role: Role, worker: Worker, fleet: FleetView
    ) -> float | None:
        predictor, load = self.predictor, fleet.load(worker)
        unread = max(0, profile.prompt_tokens - profile.cached_tokens.get(worker.name, 0))
        if role is Role.PREFILL:
            load = behind_queue(load, profile.queued_tokens, fleet)
            return predictor.prefill_s(worker, load, unread)
        written = expected_output(profile.max_output_tokens)
        step_s = predictor.step_s(worker, load, profile.prompt_tokens + written / 2)
        read_s = predictor.prefill_s(worker, load, unread)
        if step_s is None:
            return None
        return written * step_s + (read_s or 0.0)
