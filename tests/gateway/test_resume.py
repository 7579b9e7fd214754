"""A decode worker dies inside its answer: another goes on, and the client sees no difference."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, eventually

Build = Callable[..., Stack]
TWO = {"p0": "prefill", "d0": "decode", "d1": "decode"}
THREE = {**TWO, "d2": "decode"}


def ask(stack: Stack, *, chat: bool = False, prompt: object = SHORT, **more: object) -> bytes:
    body: dict[str, object] = {"model": "fake-model", "stream": True, "max_tokens": 8, **more}
    if chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        status, _, answer = stack.request("POST", "/v1/chat/completions", body)
    else:
        body["prompt"] = prompt
        status, _, answer = stack.request("POST", "/v1/completions", body)
    assert status == 200
    return answer


def text(answer: bytes) -> str:
    said = ""
    for line in answer.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                said += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return said


def shared(stack: Stack, how: Behaviour) -> None:
    """Whichever worker is asked first misbehaves; ``how.times`` is counted by all together."""
    for name, engine in stack.engines.items():
        if name.startswith("d"):
            engine.behaviour = how


def broken(stack: Stack, **more: object) -> bytes:
    """Return what a client got of a stream that broke off visibly."""
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(stack, **more)  # type: ignore[arg-type]
    assert b"upstream_broke_off" in caught.value.partial
    assert b"[DONE]" not in caught.value.partial
    return caught.value.partial


def last_body(stack: Stack) -> dict[str, object]:
    """Return the body of the request that went on with an answer."""
    bodies = [b for e in stack.engines.values() for b in e.seen.bodies]
    (resumed,) = [b for b in bodies if isinstance(b.get("prompt"), list)]
    return resumed


DEATH = Behaviour(close="stream", after_chunks=2, times=1)


def death(**more: object) -> Behaviour:
    """Return a worker that dies after two tokens, once."""
    return replace(DEATH, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [1, 2, 5, 7])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", [SHORT, LONG])
@pytest.mark.parametrize("closing", [False, True])
def test_stream_goes_on_as_if_nothing_had_been(
    build: Build, after: int, chat: bool, prompt: str, closing: bool
) -> None:
    stack = build(**TWO)
    more = {"stream_options": {"include_usage": True}}
    whole = ask(stack, chat=chat, prompt=prompt, **more)
    shared(stack, Behaviour(close="stream", after_chunks=after, times=1, close_delimited=closing))
    answer = ask(stack, chat=chat, prompt=prompt, **more)
    assert text(answer) == text(whole)
    assert answer.count(b"[DONE]") == 1
    assert answer.count(b"data: ") == whole.count(b"data: ")
    assert b'"token_ids":[' not in answer
    usage = [json.loads(x[6:])["usage"] for x in answer.splitlines() if b'"usage":' in x]
    expected = [json.loads(x[6:])["usage"] for x in whole.splitlines() if b'"usage":' in x]
    assert usage == expected
    stack.wait_idle()
    record = max(stack.records(2), key=lambda r: int(str(r["resumes"])))
    assert (record["resumes"], record["outcome"]) == (1, "ok")
    assert record["output_tokens"] == 8
    assert stack.metric("disagg_resumed", ()) == 1


def test_stream_survives_two_deaths(build: Build) -> None:
    stack = build(**THREE)
    whole = ask(stack)
    shared(stack, Behaviour(close="stream", after_chunks=2, times=2))
    assert text(ask(stack)) == text(whole)
    stack.wait_idle()
    assert stack.records(2)[1]["resumes"] == 2
    assert all(e.seen.requests for n, e in stack.engines.items() if n != "p0")


def test_third_death_breaks_the_stream(build: Build) -> None:
    stack = build(**THREE)
    shared(stack, Behaviour(close="stream", after_chunks=2, times=3))
    broken(stack)
    stack.wait_idle()
    assert stack.records(1)[0]["outcome"] == "broken"


def test_death_after_the_finish_reason_loses_nothing(build: Build) -> None:
    stack = build(**TWO, gateway={"idle_s": 0.3})
    more = {"stream_options": {"include_usage": True}}
    whole = ask(stack, **more)
    shared(stack, Behaviour(hang_after="finish", times=1))
    answer = ask(stack, **more)
    assert text(answer) == text(whole)
    assert answer.endswith(b"data: [DONE]\n\n")
    assert b'"completion_tokens":8' in answer


def test_silent_worker_is_replaced(build: Build) -> None:
    stack = build(**TWO, gateway={"idle_s": 0.3})
    whole = ask(stack)
    shared(stack, Behaviour(hang="stream", after_chunks=3, times=1))
    assert text(ask(stack)) == text(whole)


@pytest.mark.parametrize(
    ("more", "why"),
    [({"stop": "x"}, "stop"), ({"logprobs": 1}, "logprobs"), ({"n": 2}, "n > 1")],
)
def test_what_cannot_go_on_breaks_off_and_says_why(
    build: Build, more: dict[str, object], why: str
) -> None:
    stack = build(**TWO)
    shared(stack, death())
    assert why.encode() in broken(stack, **more)
    stack.wait_idle()
    assert stack.records(1)[0]["not_resumed"] == why


def test_no_other_worker(build: Build) -> None:
    stack = build(d0="decode")
    shared(stack, death())
    assert b"no other worker" in broken(stack)
    stack.wait_idle()


def test_resume_turned_off(build: Build) -> None:
    stack = build(**TWO, gateway={"resume": False})
    shared(stack, death())
    broken(stack)
    assert all(not body.get("return_token_ids") for body in stack.engines["d0"].seen.bodies)


def test_death_inside_an_event_leaves_no_half_event_with_the_client(build: Build) -> None:
    stack = build(**TWO)
    whole = ask(stack)
    shared(stack, death(close="event"))
    answer = ask(stack)
    assert text(answer) == text(whole)
    assert answer.count(b"data: ") == whole.count(b"data: ")
    assert all(json.loads(e[6:]) for e in answer.split(b"\n\n") if e.startswith(b"data: {"))


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("chat", [False, True])
def test_death_inside_a_character_does_not_lose_it(build: Build, after: int, chat: bool) -> None:
    stack = build(**TWO)
    odd = Behaviour(odd_chars=True)
    shared(stack, odd)
    whole = ask(stack, chat=chat)
    assert any(ord(c) > 0x1F000 for c in text(whole))
    shared(stack, death(after_chunks=after, odd_chars=True, then=odd))
    assert text(ask(stack, chat=chat)) == text(whole)
    stack.wait_idle()
    assert stack.records(2)[1]["output_tokens"] == 8


@pytest.mark.parametrize("code", [500, 503])
@pytest.mark.parametrize("chunk_s", [0.0, 0.02], ids=["with the token before", "by itself"])
def test_error_event_inside_a_stream_is_not_seen_by_the_client(
    build: Build, code: int, chunk_s: float
) -> None:
    stack = build(**TWO)
    whole = ask(stack)
    shared(stack, Behaviour(error_inside=code, after_chunks=3, chunk_s=chunk_s, times=1))
    answer = ask(stack)
    assert (text(answer), answer.count(b"[DONE]")) == (text(whole), 1)
    assert b'"error"' not in answer
    stack.wait_idle()
    assert stack.records(2)[1]["failures"][0]["kind"] == "error_event"  # type: ignore[index]


def test_clients_own_error_inside_a_stream_reaches_it(build: Build) -> None:
    stack = build(**TWO)
    shared(stack, Behaviour(error_inside=400, after_chunks=3, times=1))
    assert b"the engine died" in ask(stack)


@pytest.mark.parametrize("status", [400, 500, 503])
def test_next_worker_that_refuses_is_passed_over(build: Build, status: int) -> None:
    stack = build(**THREE)
    whole = ask(stack)
    shared(stack, death(then=Behaviour(status=status, times=1)))
    assert text(ask(stack)) == text(whole)
    stack.wait_idle()
    record = stack.records(2)[1]
    assert (record["resumes"], record["outcome"]) == (1, "ok")
    assert [x["kind"] for x in record["failures"]] == ["closed", f"http_{status}"]  # type: ignore


def test_every_other_worker_refuses(build: Build) -> None:
    stack = build(**THREE)
    shared(stack, death(then=Behaviour(status=500)))
    broken(stack)
    stack.wait_idle()


def test_next_worker_that_never_answers_is_given_up(build: Build) -> None:
    stack = build(**THREE, gateway={"first_byte_s": 0.3})
    whole = ask(stack)
    shared(stack, death(then=Behaviour(hang="head", times=1)))
    assert text(ask(stack)) == text(whole)


BOUNDS = [
    ({"max_tokens": 8}, {"max_tokens": 6}),
    ({"max_tokens": 8, "min_tokens": 5}, {"max_tokens": 6, "min_tokens": 3}),
    ({"max_tokens": 8, "min_tokens": 1}, {"max_tokens": 6, "min_tokens": 0}),
    ({"max_tokens": 9, "max_completion_tokens": 8}, {"max_tokens": 7, "max_completion_tokens": 6}),
    ({"max_tokens": None}, {"max_tokens": 14}),  # vLLM's own bound of a completion is 16
]


@pytest.mark.parametrize(("asked", "rest"), BOUNDS)
def test_bounds_are_reduced_by_what_was_written(
    build: Build, asked: dict[str, object], rest: dict[str, object]
) -> None:
    stack = build(**TWO)
    shared(stack, death())
    ask(stack, **asked)
    body = last_body(stack)
    assert {k: body.get(k) for k in ("max_tokens", "min_tokens", "max_completion_tokens")} == {
        **dict.fromkeys(("max_tokens", "min_tokens", "max_completion_tokens")), **rest,
    }  # fmt: skip


def open_stream(stack: Stack, **more: object) -> socket.socket:
    """Return a client's socket with a small buffer, its request sent."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", stack.port))
    body = {"model": "fake-model", "stream": True, "prompt": SHORT, "max_tokens": 8, **more}
    raw = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw)
    sock.sendall(head + raw)
    return sock


def test_client_gone_while_another_worker_is_asked(build: Build) -> None:
    stack = build(**TWO)
    shared(stack, death(then=Behaviour(hang="head")))
    engines = [stack.engines["d0"], stack.engines["d1"]]
    with contextlib.closing(open_stream(stack)):
        eventually(lambda: all(e.seen.requests for e in engines), "both were asked")
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["outcome"] == "client_gone"
    eventually(lambda: sum(e.seen.aborted for e in engines) == 2, "both calls are over")


def test_slow_client_gets_the_rest_and_memory_stays_bounded(build: Build) -> None:
    stack = build(**TWO)
    whole = ask(stack, max_tokens=100_000)
    shared(stack, death(after_chunks=60_000))
    with contextlib.closing(open_stream(stack, max_tokens=100_000)) as sock:
        eventually(lambda: len(stack.gateway.active) == 1, "the request runs")
        (client,) = [c for c in stack.gateway.connections if c.busy]
        eventually(lambda: client.transport.get_write_buffer_size() > 0, "bytes wait")
        assert max(client.transport.get_write_buffer_size() for _ in range(1000)) < 1 << 20
        sock.settimeout(10)
        with contextlib.closing(http.client.HTTPResponse(sock)) as answer:
            answer.begin()
            assert text(answer.read()) == text(whole)
    stack.wait_idle()
    assert stack.records(2)[1]["resumes"] == 1


def test_retry_is_decided_with_the_requests_own_profile(build: Build) -> None:
    classes = {"gold": {"ttft_s": 1.0, "priority": 7}}
    rules = {"slo_classes": classes, "default_slo_class": "gold"}
    stack = build(**TWO, scheduler=rules)
    seen = []
    scheduler = stack.gateway._scheduler

    class Watched:  # a method of a compiled object cannot be replaced
        wants_ends = scheduler.wants_ends
        request_ended = scheduler.request_ended

        def decide(self, profile, *more):  # type: ignore[no-untyped-def]
            seen.append(profile)
            return scheduler.decide(profile, *more)

    stack.gateway._scheduler = Watched()  # type: ignore[assignment]
    shared(stack, death())
    ask(stack)
    first, second = seen
    assert (second.slo_class, second.priority, second.ttft_slo_s) == ("gold", 7, 1.0)
    assert second.arrival_s == first.arrival_s
