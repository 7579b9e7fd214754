"""A decode worker dies inside its answer: another goes on, and the client sees no difference."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack

Build = Callable[..., Stack]
TWO = {"p0": "prefill", "d0": "decode", "d1": "decode"}
THREE = {**TWO, "d2": "decode"}


def ask(stack: Stack, *, chat: bool = False, prompt: str = SHORT, **more: object) -> bytes:
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


def die(stack: Stack, how: Behaviour, *names: str) -> None:
    for name in names or ("d0", "d1"):
        stack.engines[name].behaviour = how


def shared(stack: Stack, how: Behaviour) -> None:
    """Whichever worker is asked first misbehaves; ``how.times`` is counted by all together."""
    die(stack, how, *(n for n in stack.engines if n.startswith("d")))


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


def test_third_death_breaks_the_stream(build: Build) -> None:
    stack = build(**THREE)
    shared(stack, Behaviour(close="stream", after_chunks=2, times=3))
    with pytest.raises(Exception, match="IncompleteRead"):
        ask(stack)
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
    shared(stack, Behaviour(close="stream", after_chunks=2, times=1))
    with pytest.raises(Exception, match="IncompleteRead") as caught:
        ask(stack, **more)
    assert why.encode() in caught.value.partial  # type: ignore[attr-defined]
    stack.wait_idle()
    assert stack.records(1)[0]["not_resumed"] == why


def test_no_other_worker(build: Build) -> None:
    stack = build(d0="decode")
    shared(stack, Behaviour(close="stream", after_chunks=2, times=1))
    with pytest.raises(Exception, match="IncompleteRead") as caught:
        ask(stack)
    assert b"no other worker" in caught.value.partial  # type: ignore[attr-defined]


def test_resume_turned_off(build: Build) -> None:
    stack = build(**TWO, gateway={"resume": False})
    shared(stack, Behaviour(close="stream", after_chunks=2, times=1))
    with pytest.raises(Exception, match="IncompleteRead"):
        ask(stack)
    assert all(not body.get("return_token_ids") for body in stack.engines["d0"].seen.bodies)
