"""The scheduler half, told what vLLM's scheduler tells it, without an engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from disagg_plugins.errors import AuthenticationError
from disagg_plugins.types import HandoffId
from disagg_vllm.scheduler_side import SchedulerSide, digest_of
from disagg_vllm.steps import LoadResult, StepResult

BLOCK_TOKENS = 16
BLOCK_BYTES = 1000
ENDPOINTS = [{"tp_rank": 0, "tp_size": 1, "host_id": "h", "addresses": {"tcp": "127.0.0.1:1"}}]


@dataclass
class Request:
    """What the scheduler half reads of a vLLM request."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None = None
    lora_request: object | None = None
    text: str = ""

    @property
    def prompt_token_ids(self) -> list[int]:
        return [len(self.text)] + [7] * (self.num_prompt_tokens - 1)


@dataclass
class New:
    """vLLM's NewRequestData, as far as it is read."""

    req_id: str
    block_ids: list[list[int]]
    num_computed_tokens: int = 0


@dataclass
class Cached:
    """vLLM's CachedRequestData, as far as it is read."""

    req_ids: list[str] = field(default_factory=list)
    new_block_ids: list[Any] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class Output:
    """vLLM's SchedulerOutput, as far as it is read."""

    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A scheduler half with everything around it."""

    def __init__(self, *, staging_blocks: int = 100, tp_size: int = 1) -> None:
        self.clock = Clock()
        self.reports: list[dict[str, Any]] = []
        self.side = SchedulerSide(
            block_size_tokens=BLOCK_TOKENS,
            block_bytes=BLOCK_BYTES,
            staging_bytes=staging_blocks * BLOCK_BYTES,
            staging_wait_s=2.0,
            tp_size=tp_size,
            verify=self.verify,
            report=self.reports.append,
            clock=self.clock,
        )
        self.side.endpoints = list(ENDPOINTS)

    @staticmethod
    def verify(ticket: str, step: str) -> HandoffId:
        if not ticket.startswith("ticket-"):
            raise AuthenticationError("the ticket was not signed with this fleet's secret")
        return HandoffId(ticket.removeprefix("ticket-"))

    def ends(self, handoff_id: str) -> None:
        self.side.take_result(StepResult(ended=Counter([handoff_id])))


def prefill(name: str = "p", tokens: int = 40, ticket: str | None = None) -> Request:
    record = {"version": 1, "step": "prefill", "ticket": ticket or f"ticket-{name}"}
    return Request(name, tokens, {"disagg": record})


def decode(name: str = "d", tokens: int = 40, published: int | None = None) -> Request:
    record = {
        "version": 1,
        "step": "decode",
        "ticket": f"ticket-{name}",
        "num_tokens": tokens if published is None else published,
        "prompt": digest_of(Request("", tokens)),
        "endpoints": ENDPOINTS,
    }
    return Request(name, tokens, {"disagg": record})


def test_a_request_without_handoff_is_left_alone() -> None:
    bench = Bench()
    assert bench.side.num_matched_tokens(Request("r", 40), 0) == (0, False)
    plan = bench.side.take_plan(Output([New("r", [[1, 2, 3]])], num_scheduled_tokens={"r": 40}))
    assert not plan.publish
    assert bench.side.request_finished(Request("r", 40)) is None


def test_a_prompt_in_one_chunk_is_published_whole_and_answers_with_endpoints() -> None:
    bench, request = Bench(), prefill(tokens=40)
    assert bench.side.num_matched_tokens(request, 0) == (0, False)
    plan = bench.side.take_plan(Output([New("p", [[7, 8, 9]])], num_scheduled_tokens={"p": 40}))
    (step,) = plan.publish
    assert (step.first_block, step.block_ids, step.last) == (0, (7, 8, 9), True)
    answer = bench.side.request_finished(request)
    assert answer == {
        "disagg": {
            "version": 1,
            "num_tokens": 40,
            "prompt": digest_of(request),
            "endpoints": ENDPOINTS,
        }
    }


def test_chunks_publish_whole_blocks_and_the_last_one_the_rest() -> None:
    bench = Bench()
    bench.side.num_matched_tokens(prefill(tokens=50), 0)
    first = bench.side.take_plan(Output([New("p", [[1, 2]])], num_scheduled_tokens={"p": 20}))
    second = bench.side.take_plan(
        Output(scheduled_cached_reqs=Cached(["p"], [[[3]]], [20]), num_scheduled_tokens={"p": 20})
    )
    third = bench.side.take_plan(
        Output(scheduled_cached_reqs=Cached(["p"], [[[4]]], [40]), num_scheduled_tokens={"p": 10})
    )
    steps = [
        (s.first_block, s.block_ids, s.last) for p in (first, second, third) for s in p.publish
    ]
    assert steps == [(0, (1,), False), (1, (2,), False), (2, (3, 4), True)]


def test_blocks_from_the_prefill_workers_own_prefix_cache_are_published_too() -> None:
    bench = Bench()
    bench.side.num_matched_tokens(prefill(tokens=40), 32)
    plan = bench.side.take_plan(
        Output([New("p", [[5, 6, 7]], num_computed_tokens=32)], num_scheduled_tokens={"p": 8})
    )
    assert plan.publish[0].block_ids == (5, 6, 7)


def test_a_preempted_prefill_goes_on_with_its_new_blocks() -> None:
    bench = Bench()
    bench.side.num_matched_tokens(prefill(tokens=40), 0)
    bench.side.take_plan(Output([New("p", [[1, 2]])], num_scheduled_tokens={"p": 32}))
    plan = bench.side.take_plan(
        Output(
            scheduled_cached_reqs=Cached(["p"], [[[11, 12, 13]]], [0], {"p"}),
            num_scheduled_tokens={"p": 40},
        )
    )
    (step,) = plan.publish
    assert (step.first_block, step.block_ids, step.last) == (2, (13,), True)


def test_a_decode_request_loads_only_what_its_prefix_cache_lacks() -> None:
    bench, request = Bench(), decode(tokens=40)
    assert bench.side.num_matched_tokens(request, 16) == (24, True)
    bench.side.after_alloc(request, [3, 4, 5], 24)
    (load,) = bench.side.take_plan(Output()).load
    assert (load.first_token, load.end_token, load.block_ids) == (16, 40, (3, 4, 5))
    # vLLM calls once more when the load is done, with nothing left to load.
    bench.side.after_alloc(request, [3, 4, 5], 0)
    assert not bench.side.take_plan(Output()).load


def test_a_load_is_reported_with_what_was_loaded_cached_and_recomputed() -> None:
    bench, request = Bench(), decode(tokens=40)
    bench.side.num_matched_tokens(request, 16)
    bench.side.after_alloc(request, [3, 4, 5], 24)
    bench.side.take_result(StepResult(loads=[LoadResult("d", "d", "", "shm", "native", 24, 960)]))
    (report,) = bench.reports
    assert report["kind"] == "loaded"
    assert (report["num_tokens"], report["tokens_local"], report["tokens_recomputed"]) == (
        23,
        16,
        1,
    )
    assert (report["bytes"], report["transport"]) == (960, "shm")
    assert bench.side.num_matched_tokens(request, 0) == (0, False), "a load happens once"


def test_ranks_of_a_tensor_parallel_worker_are_reported_as_one() -> None:
    bench, request = Bench(tp_size=2), decode(tokens=40)
    bench.side.num_matched_tokens(request, 0)
    bench.side.after_alloc(request, [3, 4, 5], 40)
    bench.side.take_result(StepResult(loads=[LoadResult("d", "d", "", "shm", "native", 40, 500)]))
    assert not bench.reports
    bench.side.take_result(StepResult(loads=[LoadResult("d", "d", "", "shm", "native", 40, 500)]))
    assert bench.reports[0]["bytes"] == 1000


def test_a_failed_load_is_reported_and_the_request_computes_everything() -> None:
    bench, request = Bench(), decode(tokens=40)
    bench.side.num_matched_tokens(request, 0)
    bench.side.after_alloc(request, [3, 4, 5], 40)
    bench.side.take_result(StepResult(loads=[LoadResult("d", "d", "TransportError: reset")]))
    (report,) = bench.reports
    assert (report["kind"], report["tokens_recomputed"]) == ("failed", 40)
    assert bench.side.num_matched_tokens(request, 0) == (0, False)


def test_a_prompt_that_is_wholly_cached_releases_the_handoff_unread() -> None:
    bench, request = Bench(), decode(tokens=33)
    assert bench.side.num_matched_tokens(request, 32) == (0, False)
    bench.side.after_alloc(request, [3, 4, 5], 0)
    plan = bench.side.take_plan(Output())
    assert [r.handoff_id for r in plan.release] == ["d"]
    assert not plan.release[0].failed
    assert bench.reports[0]["tokens_recomputed"] == 1


def test_unlike_prompt_lengths_are_refused_and_the_publisher_is_freed() -> None:
    bench = Bench()
    bench.side.on_new_request(decode(tokens=40, published=41))
    assert "41" in bench.reports[0]["problem"]
    assert bench.side.take_plan(Output()).release[0].failed
    assert bench.side.counts["mismatched"] == 1


def test_another_prompt_of_the_same_length_is_refused() -> None:
    bench, request = Bench(), decode(tokens=40)
    request.text = "other"
    assert bench.side.num_matched_tokens(request, 0) == (0, False)
    assert bench.side.counts["mismatched"] == 1
    assert bench.side.take_plan(Output()).release[0].failed


@pytest.mark.parametrize(
    "params",
    [
        {"disagg": 3},
        {"disagg": {}},
        {"disagg": {"version": 2, "step": "prefill", "ticket": "ticket-x"}},
        {"disagg": {"version": 1, "step": "both", "ticket": "ticket-x"}},
        {"disagg": {"version": 1, "step": "prefill", "ticket": "forged"}},
        {"disagg": {"version": 1, "step": "prefill", "ticket": "x" * 2000}},
        {"disagg": {"version": 1, "step": "decode", "ticket": "ticket-x", "num_tokens": -1}},
        {"disagg": {"version": 1, "step": "decode", "ticket": "ticket-x", "num_tokens": 4}},
        {"disagg": {"version": 1, "step": "decode", "ticket": "ticket-x", "prompt": "short"}},
    ],
)
def test_a_false_handoff_is_counted_and_the_request_served_without(params: Any) -> None:
    bench = Bench()
    assert bench.side.num_matched_tokens(Request("r", 40, params), 0) == (0, False)
    assert bench.side.counts["rejected"] == 1
    assert bench.side.jobs == 0


@pytest.mark.parametrize("make", [prefill, decode])
def test_a_request_with_a_lora_adapter_is_not_split(make: Any) -> None:
    bench, request = Bench(), make()
    request.lora_request = object()
    assert bench.side.num_matched_tokens(request, 0) == (0, False)
    assert bench.side.counts["rejected"] == 1


@pytest.mark.parametrize("make", [prefill, decode])
def test_one_ticket_is_good_for_one_request_at_a_time(make: Any) -> None:
    bench, first, second = Bench(), make("one"), make("one")
    second.request_id = "two"
    bench.side.on_new_request(first)
    bench.side.on_new_request(second)
    assert bench.side.jobs == 1
    assert bench.side.counts["rejected"] == 1
    assert bench.side.num_matched_tokens(second, 0) == (0, False)


def test_a_prefill_waits_for_staging_and_goes_on_when_it_is_freed() -> None:
    bench = Bench(staging_blocks=4)
    assert bench.side.num_matched_tokens(prefill("a"), 0) == (0, False)
    assert bench.side.num_matched_tokens(prefill("b"), 0) == (None, False)
    bench.ends("a")
    assert bench.side.num_matched_tokens(prefill("b"), 0) == (0, False)
    assert bench.side.reserved_bytes == 3 * BLOCK_BYTES


def test_a_prefill_that_waited_too_long_runs_unpublished() -> None:
    bench, late = Bench(staging_blocks=4), prefill("b")
    bench.side.num_matched_tokens(prefill("a"), 0)
    assert bench.side.num_matched_tokens(late, 0) == (None, False)
    bench.clock.now_s += 2.5
    assert bench.side.num_matched_tokens(late, 0) == (0, False)
    plan = bench.side.take_plan(Output([New("b", [[1, 2, 3]])], num_scheduled_tokens={"b": 40}))
    assert not plan.publish
    assert bench.side.request_finished(late) is None
    assert "staging" in bench.reports[0]["problem"]


def test_a_prompt_larger_than_the_whole_staging_area_does_not_wait() -> None:
    bench = Bench(staging_blocks=2)
    assert bench.side.num_matched_tokens(prefill(tokens=40), 0) == (0, False)
    assert bench.side.counts["staging_full"] == 1


def test_staging_of_a_tensor_parallel_worker_is_free_when_every_rank_said_so() -> None:
    bench = Bench(tp_size=2)
    bench.side.num_matched_tokens(prefill("a"), 0)
    bench.ends("a")
    assert bench.side.reserved_bytes > 0
    bench.ends("a")
    assert bench.side.reserved_bytes == 0


def test_an_aborted_prefill_aborts_its_publication() -> None:
    bench, request = Bench(), prefill(tokens=40)
    bench.side.num_matched_tokens(request, 0)
    bench.side.take_plan(Output([New("p", [[1]])], num_scheduled_tokens={"p": 16}))
    assert bench.side.request_finished(request) is None
    assert [i for i, _ in bench.side.take_plan(Output()).abort] == ["p"]


def test_a_prefill_aborted_before_it_ran_gives_its_staging_back() -> None:
    bench, request = Bench(), prefill()
    bench.side.num_matched_tokens(request, 0)
    bench.side.request_finished(request)
    assert bench.side.reserved_bytes == 0


def test_a_decode_aborted_before_its_load_releases_the_handoff_as_failed() -> None:
    bench, request = Bench(), decode()
    bench.side.on_new_request(request)
    bench.side.request_finished(request)
    assert bench.side.take_plan(Output()).release[0].failed


def test_a_decode_aborted_during_its_load_is_forgotten_when_the_load_ends() -> None:
    bench, request = Bench(), decode()
    bench.side.num_matched_tokens(request, 0)
    bench.side.after_alloc(request, [1, 2, 3], 40)
    bench.side.request_finished(request)
    assert bench.side.jobs == 1
    bench.side.take_result(StepResult(loads=[LoadResult("d", "d")]))
    assert bench.side.jobs == 0


def test_nothing_is_remembered_after_many_requests() -> None:
    bench = Bench()
    for i in range(500):
        p, d = prefill(f"p{i}"), decode(f"d{i}")
        bench.side.num_matched_tokens(p, 0)
        bench.side.take_plan(
            Output([New(p.request_id, [[1, 2, 3]])], num_scheduled_tokens={p.request_id: 40})
        )
        bench.side.request_finished(p)
        bench.ends(f"p{i}")
        bench.side.num_matched_tokens(d, 0)
        bench.side.after_alloc(d, [1, 2, 3], 40)
        bench.side.take_result(StepResult(loads=[LoadResult(d.request_id, d.request_id)]))
        bench.side.request_finished(d)
    assert bench.side.jobs == 0
    assert bench.side.reserved_bytes == 0
    assert not bench.side._seen
    assert not bench.side._ended
    assert not bench.side._handoffs
