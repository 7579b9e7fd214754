"""Prefer the decode worker with the most room in its KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.prediction import expected_output
from disagg_plugins.scheduling.worker_scores import kv_room
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence


class KvRoom:
    """Scores by the share of KV that is free once this request is there.

    What the engine says it uses lags behind, and what this gateway sent knows nothing of other
    gateways, so the fuller of the two counts. A worker of which neither is known gets no opinion.
    """

    @hookimpl
    def disagg_score_workers(
        self, profile: RequestProfile, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float] | None:
        """See ``hookspecs.disagg_score_workers``."""
        if role is Role.PREFILL:
            return None  # a prompt's KV stays there for a moment only
        need = profile.prompt_tokens + expected_output(profile.max_output_tokens)
        return kv_room(workers, fleet.loads, need)
