"""A request ends when its client waits no longer: wherever it is, and nobody is blamed for it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable

import msgspec
import pytest

from disagg_plugins.gateway.deadlines import Deadlines, timeout_of
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.policy import GatewayPolicy
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SECRET, SHORT, Stack, eventually
from tests.gateway.test_queue import occupy, queueing, waiting

Build = Callable[..., Stack]

HANG = Behaviour(hang="head")


def ask(
    stack: Stack, prompt: str, timeout: str, *, stream: bool = False
) -> tuple[int, dict[str, str], bytes]:
    body = {"model": "fake-model", "prompt": prompt, "max_tokens": 8, "stream": stream}
    return stack.request("POST", "/v1/completions", body, {"x-disagg-timeout": timeout})


def code_of(answer: bytes) -> object:
    return json.loads(answer)["error"]["code"]


def test_without_a_header_the_policys_bound_holds() -> None:
    assert timeout_of([], None) is None
    assert timeout_of([], 9.0) == 9.0


@pytest.mark.parametrize(("given", "expected_s"), [(b"2.5", 2.5), (b" 7 ", 7.0), (b"100", 9.0)])
def test_a_client_may_ask_for_less_than_the_policys_bound(given: bytes, expected_s: float) -> None:
    assert timeout_of([(b"x-disagg-timeout", given)], 9.0) == expected_s


@pytest.mark.parametrize("given", [b"", b"0", b"-1", b"nan", b"inf", b"1e3", b"soon", b"9" * 40])
def test_a_timeout_that_is_no_positive_number_is_refused(given: bytes) -> None:
    with pytest.raises(RequestError, match="seconds") as refused:
        timeout_of([(b"x-disagg-timeout", given)], None)
    assert (refused.value.status, refused.value.code) == (400, "invalid_timeout")


def test_a_false_timeout_is_the_clients_mistake(build: Build) -> None:
    status, _, answer = ask(build(), SHORT, "soon")
    assert (status, code_of(answer)) == (400, "invalid_timeout")


def test_nothing_has_passed_before_its_time() -> None:
    deadlines = Deadlines(GatewayPolicy(prefill_s=1.0, first_byte_s=2.0, idle_s=3.0), 0.0, 10.0)
    assert not deadlines.passed(10.0)
    assert deadlines.passed(10.1)
    deadlines.sent("prefill", 5.0)
    assert deadlines.passed(6.1)
    deadlines.prefill_s = float("inf")
    deadlines.sent("decode", 6.0)
    assert not deadlines.passed(8.0)
    deadlines.heard(8.0, begun=True)
    assert not deadlines.passed(9.9)
    deadlines.over()
    assert not deadlines.passed(1e9)


def test_a_client_that_left_with_its_whole_answer_is_not_late() -> None:
    deadlines = Deadlines(GatewayPolicy(), 0.0, 10.0)
    deadlines.left(9.5)
    assert not deadlines.passed(10.4)
    assert deadlines.passed(10.6)
    assert deadlines.request_s > 1e9  # what passes is the wait for the worker's end


@pytest.mark.parametrize("slow", ["p0", "d0"])
def test_a_request_that_no_worker_answers_in_time_ends_with_504(build: Build, slow: str) -> None:
    stack = build(behaviours={slow: HANG})
    status, _, answer = ask(stack, LONG, "0.3")
    assert (status, code_of(answer)) == (504, "deadline_exceeded")
    stack.wait_idle()
    eventually(lambda: stack.engines[slow].seen.aborted == 1, "the worker saw it end")
    (record,) = stack.records(1)
    assert (record["outcome"], record["split"]) == ("deadline", "no: deadline")
    assert record["failures"] == []
    assert stack.metric("disagg_failures") == 0
    assert stack.metric("disagg_split_not_happening") == 0


def test_a_stream_breaks_off_with_an_event_that_says_why(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(chunk_s=0.2)})
    with pytest.raises(http.client.IncompleteRead) as broken:
        ask(stack, SHORT, "0.5", stream=True)
    *_, last = [event for event in broken.value.partial.split(b"\n\n") if event]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    stack.wait_idle()
    (record,) = stack.records(1)
    assert (record["outcome"], record["resumes"]) == ("deadline", 0)


def test_the_policys_bound_ends_a_request_without_a_header(build: Build) -> None:
    stack = build(gateway={"request_s": 0.3}, behaviours={"d0": HANG})
    status, answer = stack.complete(SHORT)
    assert (status, code_of(answer)) == (504, "deadline_exceeded")


def test_a_request_in_time_is_served(build: Build) -> None:
    stack = build()
    status, _, answer = ask(stack, LONG, "60")
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 8
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["outcome"] == "ok"


def test_a_request_that_waits_for_a_worker_ends_at_its_deadline(build: Build) -> None:
    stack = build(scheduler=queueing(), p0="prefill", d0="decode")
    occupant = occupy(stack)
    status, _, answer = ask(stack, LONG, "0.4")
    assert (status, code_of(answer)) == (504, "deadline_exceeded")
    assert b"waited" in answer
    waiting(stack, 0)
    assert stack.engines["p0"].seen.requests == 1  # only the occupant's
    occupant.close()
    stack.wait_idle()


def test_the_ticket_of_a_handoff_is_void_when_the_deadline_has_passed(build: Build) -> None:
    stack = build()
    assert ask(stack, LONG, "20")[0] == 200
    params = stack.engines["p0"].seen.bodies[-1]["kv_transfer_params"]
    text = msgspec.convert(params, dict[str, dict[str, object]])["disagg"]["ticket"]
    ticket = verify(SECRET, str(text), time.time())
    assert 10.0 < ticket.expires_s - ticket.issued_s <= 20.0
