"""A second worker is asked when the first says nothing; one of them answers, the other is ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, eventually

Build = Callable[..., Stack]

SOON = {"hedge_s": 0.1}
HANG = Behaviour(hang="head")
TWO = {"p0": "prefill", "d0": "decode", "d1": "decode"}
ALL = {"split": {"rule": "always"}}
NONE = {"split": {"rule": "never"}}


def decodes(stack: Stack) -> list[int]:
    return [stack.engines[name].seen.requests for name in ("d0", "d1")]


@pytest.mark.parametrize("stream", [False, True])
def test_second_worker_answers_where_the_first_says_nothing(build: Build, stream: bool) -> None:
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": HANG})
    for _ in range(2):  # in turn: one of them begins with the worker that hangs
        status, answer = stack.complete(SHORT, stream=stream)
        assert status == 200
        assert b"t3" in answer
    stack.wait_idle()
    assert stack.metric("disagg_hedges", ("won",)) >= 1
    eventually(lambda: stack.engines["d0"].seen.aborted >= 1, "the silent worker was ended")
    won = [r for r in stack.records(2) if r["hedge"] == "won"]
    assert {r["decode"] for r in won} == {"d1"}
    assert all(r["outcome"] == "ok" and r["retries"] == 0 for r in won)
    assert stack.metric("disagg_failures") == 0


def test_the_load_that_is_told_is_that_of_the_worker_that_answers(build: Build) -> None:
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": HANG})
    stack.gateway.read_tokens["d0"] = 5000  # as of a worker that has read much
    for _ in range(2):
        assert stack.complete(SHORT, stream=True)[0] == 200
    stack.wait_idle()
    told, *_ = [r for r in stack.records(2) if r["hedge"] == "won"]
    assert told["decode"] == "d1"
    assert told["decode_read_tokens"] == 0
    assert stack.gateway.read_tokens["d0"] == 5000
    assert stack.gateway.read_tokens["d1"] == 2 * int(str(told["prompt_tokens_estimate"]))


def test_nobody_is_asked_twice_unless_the_policy_says_so(build: Build) -> None:
    stack = build(
        gateway={"first_byte_s": 0.5}, scheduler=NONE, **TWO, behaviours={"d0": HANG, "d1": HANG}
    )
    assert stack.complete(SHORT)[0] == 504
    stack.wait_idle()
    assert stack.metric("disagg_hedges") == 0


def test_first_worker_that_speaks_after_all_answers(build: Build) -> None:
    slow = Behaviour(first_s=0.4)
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": slow, "d1": slow})
    status, _ = stack.complete(SHORT)
    assert status == 200
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["hedge"] == "lost"
    assert sum(decodes(stack)) == 2
    eventually(lambda: sum(stack.engines[n].seen.aborted for n in ("d0", "d1")) == 1, "one ended")


@pytest.mark.parametrize("silent", ["p0", "decode"])
def test_hedge_of_a_split_request_computes_the_prompt_itself(build: Build, silent: str) -> None:
    stack = build(gateway=SOON, scheduler=ALL, reports=True, **TWO, behaviours={"p0": HANG})
    if silent == "decode":
        stack.engines["p0"].behaviour = Behaviour()
        stack.engines["d0"].behaviour = Behaviour(hang="head", times=1)
    for _ in range(2):
        assert stack.complete(LONG, stream=True)[0] == 200
    stack.wait_idle()
    assert stack.metric("disagg_hedges", ("won",)) >= 1
    won = [r for r in stack.records(2) if r["hedge"] == "won"]
    assert {r["split"] for r in won} == {"no: hedged"}
    assert stack.metric("disagg_split_not_happening") == 0


def test_hedge_takes_over_when_the_first_worker_fails(build: Build) -> None:
    slow, failing = Behaviour(first_s=0.6), Behaviour(status=500, first_s=0.3)
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": failing, "d1": slow})
    for _ in range(2):
        assert stack.complete(SHORT, stream=True)[0] == 200
    stack.wait_idle()
    assert stack.engines["d0"].seen.requests + stack.engines["d1"].seen.requests <= 4
    assert "won" in {r["hedge"] for r in stack.records(2)}


def test_hedge_that_fails_leaves_the_first_worker_alone(build: Build) -> None:
    slow, failing = Behaviour(first_s=0.5), Behaviour(status=500)
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": slow, "d1": failing})
    for _ in range(2):
        assert stack.complete(SHORT)[0] == 200
    stack.wait_idle()
    failed = [r for r in stack.records(2) if r["hedge"] == "failed"]
    assert {(r["decode"], r["outcome"]) for r in failed} == {("d0", "ok")}
    assert stack.metric("disagg_hedges", ("failed",)) == len(failed)


def test_one_worker_alone_is_not_asked_twice(build: Build) -> None:
    stack = build(gateway=SOON, d0="decode", behaviours={"d0": Behaviour(first_s=0.4)})
    assert stack.complete(SHORT)[0] == 200
    stack.wait_idle()
    assert stack.engines["d0"].seen.requests == 1


def test_hedges_are_paid_from_the_budget_of_retries(build: Build) -> None:
    poor = {**SOON, "retry_share": 0.0, "retries_per_s": 0.0}
    slow = Behaviour(first_s=0.4)
    stack = build(gateway=poor, scheduler=NONE, **TWO, behaviours={"d0": slow, "d1": slow})
    assert stack.complete(SHORT)[0] == 200
    stack.wait_idle()
    assert sum(decodes(stack)) == 1


def test_client_that_goes_ends_both_calls(build: Build) -> None:
    stack = build(gateway=SOON, scheduler=NONE, **TWO, behaviours={"d0": HANG, "d1": HANG})
    body = b'{"model": "fake-model", "prompt": "hello", "max_tokens": 4}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    eventually(lambda: sum(decodes(stack)) == 2, "both were asked")
    sock.close()
    stack.wait_idle()
    for name in ("d0", "d1"):
        eventually(lambda name=name: stack.engines[name].seen.aborted == 1, f"{name} saw it end")
