"""The short windows from which changes of roles are judged."""

from __future__ import annotations

import pytest

from disagg_plugins.gateway.role_loads import MAX_ENDS, RoleLoads
from disagg_plugins.telemetry.records import RequestRecord
from disagg_plugins.types import FleetView, Role, Worker, WorkerLoad

P = Worker("p", "http://h:1", "vllm", Role.PREFILL, 10)
D = Worker("d", "http://h:2", "vllm", Role.DECODE, 10)
E = Worker("e", "http://h:3", "vllm", Role.DECODE, 10)


def record(**values: object) -> RequestRecord:
    made = RequestRecord(
        request_id="r", at_s=0.0, endpoint="/v1/completions", model="m", route="local", why="",
        prefill=None, decode="d", stream=True, prompt_tokens_estimate=100,
    )  # fmt: skip
    made.outcome = "ok"
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_nothing_seen_is_nothing_used() -> None:
    loads = RoleLoads(10.0).window(100.0)
    assert all(load.utilisation == 0 and load.requests_per_s == 0 for load in loads.values())
    assert all(load.window_s == 10.0 for load in loads.values())


def test_prefill_is_used_by_reading_and_decode_by_requests_against_capacity() -> None:
    loads = RoleLoads(10.0)
    busy = {"p": WorkerLoad(3, prefills=3), "d": WorkerLoad(6), "e": WorkerLoad(2)}
    loads.sample(1.0, FleetView((P, D, E), busy))
    loads.sample(2.0, FleetView((P, D, E), {}))
    seen = loads.window(2.0)
    assert seen[Role.PREFILL].utilisation == 0.5
    assert seen[Role.DECODE].utilisation == pytest.approx(0.2)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    loads = RoleLoads(10.0)
    loads.sample(0.0, FleetView((P, D), {"d": WorkerLoad(10)}))
    loads.ended(0.0, record(output_tokens=50))
    assert loads.window(5.0)[Role.DECODE].tokens_per_s == 5.0
    later = loads.window(10.5)[Role.DECODE]
    assert (later.utilisation, later.tokens_per_s) == (0.0, 0.0)


def test_the_wait_of_a_prompt_is_what_its_length_does_not_explain() -> None:
    loads = RoleLoads(10.0)
    loads.ended(1.0, record(prompt_tokens=100, prefill_s=1.0, ttft_s=1.5))
    loads.ended(1.0, record(prompt_tokens=200, prefill_s=2.0, ttft_s=2.0))
    loads.ended(1.0, record(prompt_tokens=100, prefill_s=4.0, ttft_s=4.0))
    loads.ended(1.0, record(prompt_tokens=100, prefill_s=4.0, ttft_s=4.0))
    seen = loads.window(2.0)
    assert seen[Role.PREFILL].queue_wait_p99_s == pytest.approx(3.0)
    assert seen[Role.PREFILL].tokens_per_s == 50.0
    assert seen[Role.DECODE].requests_per_s == 0.4


def test_requests_that_failed_say_nothing() -> None:
    loads = RoleLoads(10.0)
    loads.ended(1.0, record(outcome="error", output_tokens=50))
    assert loads.window(2.0)[Role.DECODE].requests_per_s == 0


def test_memory_is_bounded_and_rates_are_over_what_is_remembered() -> None:
    loads = RoleLoads(10.0)
    for i in range(2 * MAX_ENDS):
        loads.ended(i / MAX_ENDS, record(output_tokens=1))
    assert len(loads._ends) == MAX_ENDS
    assert loads.window(2.0)[Role.DECODE].requests_per_s == pytest.approx(MAX_ENDS, rel=0.01)
