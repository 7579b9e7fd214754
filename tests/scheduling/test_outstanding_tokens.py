"""Prefer the worker with the fewest tokens before it."""

from __future__ import annotations

from disagg_plugins.scheduling.outstanding_tokens import OutstandingTokens
from disagg_plugins.types import FleetView, Role, Worker, WorkerLoad

SMALL = Worker("small", "http://127.0.0.1:1", "vllm", Role.BOTH, capacity=4)
LARGE = Worker("large", "http://127.0.0.1:2", "vllm", Role.BOTH, capacity=8)


def scores(role, **loads):
    return OutstandingTokens().disagg_score_workers(role, [SMALL, LARGE], FleetView((), loads))


def test_an_idle_worker_scores_one():
    assert scores(Role.DECODE) == {"small": 1.0, "large": 1.0}


def test_tokens_count_against_capacity():
    load = WorkerLoad(prompt_tokens=1024, output_tokens=1024)
    assert scores(Role.DECODE, small=load, large=load) == {"small": 0.5, "large": 2 / 3}


def test_a_prefill_worker_writes_nothing():
    load = WorkerLoad(output_tokens=9999)
    assert scores(Role.PREFILL, small=load)["small"] == 1.0
