"""Prefer the worker with the least work before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.types import IDLE, FleetView, Role, Worker, WorkerLoad

if TYPE_CHECKING:
    from collections.abc import Sequence

QUEUE_UNIT_TOKENS = 2048
"""Queued prompt tokens that halve a prefill worker's score: one step of vLLM's default budget."""

TOKENS_SHARE = 0.99
"""Share of the queued tokens in a prefill score: requests only tell equal queues apart."""


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
        score = _prefill_score if role is Role.PREFILL else _decode_score
        load = fleet.loads.get
        return {worker.name: score(worker, load(worker.name, IDLE)) for worker in workers}


def _decode_score(worker: Worker, load: WorkerLoad) -> float:
    return 1.0 / (1.0 + load.requests / worker.capacity)


def _prefill_score(worker: Worker, load: WorkerLoad) -> float:
    queue = 1.0 / (1.0 + load.prompt_tokens / QUEUE_UNIT_TOKENS)
    return TOKENS_SHARE * queue + (1.0 - TOKENS_SHARE) * _decode_score(worker, load)
