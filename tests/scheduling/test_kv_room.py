"""Prefer the decode worker with the most room."""

from __future__ import annotations

import pytest

from disagg_plugins.scheduling.kv_room import KvRoom
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

KNOWN = Worker("w", "http://127.0.0.1:1", "vllm", Role.BOTH, kv_tokens=1000)
UNKNOWN = Worker("w", "http://127.0.0.1:1", "vllm", Role.BOTH)


def score(worker, role=Role.DECODE, output=100, **load):
    profile = RequestProfile("r", "/v1/completions", "m", 100, max_output_tokens=output)
    fleet = FleetView((worker,), {"w": WorkerLoad(**load)})
    return KvRoom().disagg_score_workers(profile, role, [worker], fleet)


def test_what_is_sent_there_and_this_request_count():
    assert score(KNOWN, kv_tokens=300) == {"w": pytest.approx(0.5)}


def test_a_request_without_a_bound_is_expected_to_write_something():
    assert score(KNOWN, output=None) == {"w": pytest.approx(1 - 0.356)}


def test_an_endless_bound_leaves_an_opinion():
    large = Worker("w", "http://127.0.0.1:1", "vllm", Role.BOTH, kv_tokens=10_000)
    assert score(large, output=10**18) == score(large, output=4096)
    assert score(large, output=10**18)["w"] > 0.5


def test_the_fuller_of_two_views_counts():
    assert score(KNOWN, kv_usage=0.9) == {"w": pytest.approx(0.1)}
    assert score(KNOWN, kv_usage=0.1, kv_tokens=700) == {"w": pytest.approx(0.1)}


def test_the_engines_own_figure_is_enough():
    assert score(UNKNOWN, kv_usage=0.25) == {"w": 0.75}


def test_more_than_fits_scores_nothing_and_never_below():
    assert score(KNOWN, kv_tokens=10**9) == {"w": 0.0}


def test_nothing_known_is_no_opinion_and_neither_is_a_prefill_worker():
    assert score(UNKNOWN) == {}
    assert score(KNOWN, role=Role.PREFILL) is None
