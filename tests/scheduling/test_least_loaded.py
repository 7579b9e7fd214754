"""Less work before a worker never scores lower."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.scheduling.least_loaded import LeastLoaded
from disagg_plugins.types import FleetView, Role, Worker, WorkerLoad

LOADS = st.builds(
    WorkerLoad, requests=st.integers(0, 10_000), prompt_tokens=st.integers(0, 10_000_000)
)


def scores(role, *loads, capacities=None):
    capacities = capacities or [64] * len(loads)
    workers = [
        Worker(f"w{i}", f"http://127.0.0.1:{i + 1}", "vllm", Role.BOTH, capacity)
        for i, capacity in enumerate(capacities)
    ]
    fleet = FleetView(workers, {w.name: load for w, load in zip(workers, loads, strict=True)})
    answer = LeastLoaded().disagg_score_workers(role, workers, fleet)
    return [answer[w.name] for w in workers]


@given(st.sampled_from([Role.PREFILL, Role.DECODE]), LOADS)
def test_scores_are_valid(role, load):
    assert 0.0 <= scores(role, load)[0] <= 1.0


@given(LOADS, LOADS)
def test_decode_counts_requests_only(one, two):
    first, second = scores(Role.DECODE, one, two)
    assert (first > second) == (one.requests < two.requests)


@given(LOADS, LOADS)
def test_prefill_prefers_the_shorter_queue_then_fewer_requests(one, two):
    first, second = scores(Role.PREFILL, one, two)
    if one.prompt_tokens == two.prompt_tokens:
        assert (first > second) == (one.requests < two.requests)


def test_an_idle_worker_scores_one():
    assert scores(Role.PREFILL, WorkerLoad()) == scores(Role.DECODE, WorkerLoad()) == [1.0]


def test_a_prompt_more_in_the_queue_outweighs_any_number_of_requests():
    first, second = scores(
        Role.PREFILL, WorkerLoad(requests=60), WorkerLoad(requests=0, prompt_tokens=200)
    )
    assert first > second


def test_a_larger_worker_takes_more_requests():
    first, second = scores(
        Role.DECODE, WorkerLoad(requests=10), WorkerLoad(requests=10), capacities=[16, 64]
    )
    assert second > first
