"""What the simple scorers and filters compute of each worker: pure functions of load and place.

Apart from the plugins that call them, because a decision asks for some hundred of these numbers
and they may be compiled, which methods that pluggy has marked cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from disagg_plugins.types import IDLE, Worker, WorkerLoad

UNIT_TOKENS: Final = 512
"""Outstanding tokens for each request of a worker's capacity that halve its score: a chat request's
answer (about 256 tokens) and as much again of its prompt."""

QUEUE_UNIT_TOKENS: Final = 2048
"""Queued prompt tokens that halve a prefill worker's score: one step of vLLM's default budget."""

TOKENS_SHARE: Final = 0.99
"""Share of the queued tokens in a prefill score: requests only tell equal queues apart."""

SAME_HOST: Final = 1.0
SAME_ZONE: Final = 0.7
UNKNOWN: Final = 0.5
OTHER_ZONE: Final = 0.3
"""Shared memory, a network inside a zone, no labels to tell, a network between zones: only their
order matters much; the policy's weight says how far it counts against load."""

UNLIKE_ENGINES: Final = 0.5
"""Factor where KV goes through the canonical form, which costs about as much again as the copy."""


def outstanding(
    workers: Sequence[Worker], loads: Mapping[str, WorkerLoad], *, written_too: bool
) -> dict[str, float]:
    """Score by outstanding tokens against capacity; 1 is an idle worker.

    Args:
        workers: The workers.
        loads: By name; a worker that is absent is idle.
        written_too: Count the tokens to be written beside those to be read.
    """
    scores: dict[str, float] = {}
    for worker in workers:
        load = loads.get(worker.name, IDLE)
        tokens = load.prompt_tokens
        if written_too:
            tokens += load.output_tokens
        scores[worker.name] = 1.0 / (1.0 + tokens / (UNIT_TOKENS * worker.capacity))
    return scores


def least_requests(workers: Sequence[Worker], loads: Mapping[str, WorkerLoad]) -> dict[str, float]:
    """Score by requests against capacity; 1 is an idle worker."""
    scores: dict[str, float] = {}
    for worker in workers:
        scores[worker.name] = 1.0 / (1.0 + loads.get(worker.name, IDLE).requests / worker.capacity)
    return scores


def least_queued(workers: Sequence[Worker], loads: Mapping[str, WorkerLoad]) -> dict[str, float]:
    """Score by prompt tokens still to be read, then by requests; 1 is an idle worker."""
    scores: dict[str, float] = {}
    for worker in workers:
        load = loads.get(worker.name, IDLE)
        queue = 1.0 / (1.0 + load.prompt_tokens / QUEUE_UNIT_TOKENS)
        requests = 1.0 / (1.0 + load.requests / worker.capacity)
        scores[worker.name] = TOKENS_SHARE * queue + (1.0 - TOKENS_SHARE) * requests
    return scores


def kv_room(
    workers: Sequence[Worker], loads: Mapping[str, WorkerLoad], need_tokens: int
) -> dict[str, float]:
    """Score by the share of KV that is free with ``need_tokens`` more; absent: not known."""
    scores: dict[str, float] = {}
    for worker in workers:
        load = loads.get(worker.name, IDLE)
        used, holds = load.kv_usage, worker.kv_tokens
        if holds:
            sent = (load.kv_tokens + need_tokens) / holds
            used = sent if used is None or sent > used else used
        if used is not None:
            scores[worker.name] = min(1.0, max(0.0, 1.0 - used))
    return scores


def cached_share(
    workers: Sequence[Worker], cached_tokens: Mapping[str, int], prompt_tokens: int
) -> dict[str, float]:
    """Score by the share of a prompt, not empty, that a worker is believed to hold."""
    scores: dict[str, float] = {}
    for worker in workers:
        scores[worker.name] = min(1.0, cached_tokens.get(worker.name, 0) / prompt_tokens)
    return scores


def nearness(workers: Sequence[Worker], other: Worker) -> dict[str, float]:
    """Score by how cheaply KV travels between a worker and ``other``."""
    scores: dict[str, float] = {}
    host, zone, engine = _host(other), other.labels.get("zone"), other.engine
    for worker in workers:
        if _host(worker) == host:
            near = SAME_HOST
        else:
            own = worker.labels.get("zone")
            if zone is None or own is None:
                near = UNKNOWN
            else:
                near = SAME_ZONE if own == zone else OTHER_ZONE
        scores[worker.name] = near if worker.engine == engine else near * UNLIKE_ENGINES
    return scores


def _host(worker: Worker) -> str:
    return worker.labels.get("host") or worker.url.rpartition(":")[0]


def with_room(workers: Sequence[Worker], loads: Mapping[str, WorkerLoad]) -> list[Worker]:
    """Return the workers with fewer requests than their capacity, or than one on trial."""
    left = []
    for worker in workers:
        load = loads.get(worker.name, IDLE)
        if load.requests < (1 if load.trial else worker.capacity):
            left.append(worker)
    return left
