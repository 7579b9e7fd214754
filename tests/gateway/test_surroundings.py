"""The load that a request was measured under stands in its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from disagg_plugins.gateway.surroundings import Surroundings
from disagg_plugins.gateway.timeline import Timeline
from disagg_plugins.telemetry.records import RequestRecord
from disagg_plugins.types import WorkerLoad
from tests.gateway.harness import LONG, SHORT, Stack

Build = Callable[..., Stack]


def record(route: str = "local", tokens: int = 100) -> RequestRecord:
    prefill = None if route == "local" else "p0"
    return RequestRecord(
        request_id="r",
        at_s=0.0,
        endpoint="/v1/completions",
        model=None,
        route=route,
        why="",
        prefill=prefill,
        decode="d0",
        stream=True,
        prompt_tokens_estimate=tokens,
        status=200,
    )


def test_a_split_request_tells_the_queue_of_one_worker_and_the_batch_of_the_other() -> None:
    told, read = record("disaggregated"), Counter[str]()
    around = Surroundings(read, {"p0": 30, "d0": 90})
    around.sent(told, Timeline(0.0), "prefill", "p0", WorkerLoad(3, 700))
    around.read(told, "p0")
    around.sent(told, Timeline(0.0), "decode", "d0", WorkerLoad(5, 40, kv_tokens=900))
    around.answering(told)
    around.ended(told)
    assert (told.prefill_queued_tokens, told.prefill_requests) == (700, 3)
    assert (told.decode_requests, told.decode_kv_tokens) == (5, 900)
    assert told.prefill_cached_tokens == 30
    assert told.decode_read_tokens == 0
    assert read == {"p0": 70}
    assert told.sent_s is not None


def test_an_answer_tells_the_prompts_that_were_read_beside_it_but_not_its_own() -> None:
    read = Counter[str]()
    first, second = record(tokens=100), record(tokens=40)
    arounds = [Surroundings(read, {}) for _ in range(2)]
    for around, told in zip(arounds, (first, second), strict=True):
        around.sent(told, Timeline(0.0), "decode", "d0", WorkerLoad(0, 60))
        around.answering(told)
    for around, told in zip(arounds, (first, second), strict=True):
        around.ended(told)
    assert (first.decode_read_tokens, second.decode_read_tokens) == (40, 0)
    assert first.prefill_queued_tokens == 60


def test_a_request_that_was_never_answered_tells_of_no_disturbance() -> None:
    told = record()
    told.status = 503
    around = Surroundings(Counter(d0=500), {})
    around.sent(told, Timeline(0.0), "decode", "d0", WorkerLoad())
    around.ended(told)
    assert told.decode_read_tokens == 0


def test_an_answer_that_goes_on_elsewhere_counts_what_was_read_beside_it_at_both() -> None:
    told, read = record("disaggregated"), Counter[str](d0=500, d1=100)
    around = Surroundings(read, {})
    around.sent(told, Timeline(0.0), "decode", "d0", WorkerLoad())
    around.answering(told)
    read["d0"] += 30
    around.sent(told, Timeline(0.0), "decode", "d1", WorkerLoad())
    read["d0"] += 1000
    read["d1"] += 7
    around.ended(told)
    assert told.decode_read_tokens == 37


def test_the_gateway_fills_it_and_learns_from_it(build: Build) -> None:
    stack = build(reports=True)
    for prompt in (LONG, SHORT):
        assert stack.complete(prompt, stream=True, stream_options={"include_usage": True})[0] == 200
    split, local = stack.records(2)
    assert (split["route"], local["route"]) == ("disaggregated", "local")
    for told in (split, local):
        assert 0.0 <= float(str(told["sent_s"])) < float(str(told["ttft_s"]))
        assert told["decode_requests"] == 0
    assert stack.gateway.read_tokens["p0"] == split["prompt_tokens_estimate"]
    assert stack.gateway.read_tokens["d0"] == local["prompt_tokens_estimate"]
