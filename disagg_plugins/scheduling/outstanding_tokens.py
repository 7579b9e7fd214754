"""Prefer the worker with the fewest tokens still to be read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.types import IDLE, FleetView, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

UNIT_TOKENS = 512
"""Outstanding tokens for each request of a worker's capacity that halve its score: a chat request's
answer (about 256 tokens) and as much again of its prompt."""


class OutstandingTokens:
    """Scores by outstanding tokens against capacity; 1 is an idle worker.

    Requests differ a hundredfold in length, so tokens tell more of the work than requests do.
    """

    @hookimpl
    def disagg_score_workers(
        self, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float]:
        """See ``hookspecs.disagg_score_workers``."""
        scores, loads = {}, fleet.loads
        for worker in workers:
            load = loads.get(worker.name, IDLE)
            tokens = load.prompt_tokens
            if role is not Role.PREFILL:
                tokens += load.output_tokens
            scores[worker.name] = 1.0 / (1.0 + tokens / (UNIT_TOKENS * worker.capacity))
        return scores
