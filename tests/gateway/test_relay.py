"""A request's way through a real gateway with fake vLLM workers, on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, eventually

Build = Callable[..., Stack]


def events(stream: bytes) -> list[object]:
    """Return the events of a stream; blanks between their values may differ."""
    lines = [line[6:] for line in stream.split(b"\n\n") if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def text_of(stream: bytes) -> str:
    """Return the text of a stream of completion events."""
    events = [line[6:] for line in stream.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(e)["choices"] for e in events]
    return "".join(c[0]["text"] for c in choices if c)


def test_long_prompt_goes_prefill_then_decode_and_is_recorded(build: Build) -> None:
    stack = build(reports=True)
    status, answer = stack.complete()
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 4
    prefill, decode = stack.engines["p0"].seen, stack.engines["d0"].seen
    assert (prefill.prefills, prefill.locals, decode.decodes, decode.locals) == (1, 0, 1, 0)
    (record,) = stack.records(1)
    assert (record["route"], record["prefill"], record["decode"]) == ("disaggregated", "p0", "d0")
    assert record["split"] == "yes"
    assert record["prompt_tokens"] == json.loads(answer)["usage"]["prompt_tokens"]
    handoff = record["handoff"]
    assert isinstance(handoff, dict)
    assert (handoff["outcome"], handoff["report"]) == ("consumed", "complete")
    assert handoff["tokens_loaded"] > 0
    assert handoff["bytes"] > 0
    assert stack.records_path.stat().st_mode & 0o777 == 0o600


def test_split_and_local_answers_are_the_same(build: Build) -> None:
    split, local = build(), build(d0="decode")
    assert split.complete() == local.complete()
    (status, one), (_, other) = split.complete(stream=True), local.complete(stream=True)
    assert status == 200
    assert events(one) == events(other)
    assert one.endswith(b"data: [DONE]\n\n")


def test_short_prompt_stays_local(build: Build) -> None:
    stack = build()
    assert stack.complete(SHORT)[0] == 200
    assert stack.engines["p0"].seen.requests == 0
    assert stack.engines["d0"].seen.locals == 1
    (record,) = stack.records(1)
    assert record["route"] == "local"
    assert record["handoff"] is None
    assert stack.metric("disagg_split_not_happening") == 0


def test_stream_is_forwarded_byte_for_byte(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(chunk_s=0.005)})
    options = {"include_usage": True}
    status, headers, body = stack.request(
        "POST",
        "/v1/completions",
        {
            "model": "fake-model",
            "prompt": LONG,
            "stream": True,
            "max_tokens": 30,
            "stream_options": options,
        },
    )
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["transfer-encoding"] == "chunked"
    assert body.endswith(b"data: [DONE]\n\n")
    assert len(text_of(body).split()) == 30
    (record,) = stack.records(1)
    assert record["output_tokens"] == 30
    assert record["finish"] == "length"
    itl = record["itl"]
    assert isinstance(itl, dict)
    assert itl["count"] >= 3
    assert 0 < itl["p50_s"] <= itl["p99_s"] <= itl["max_s"]
    ttft, e2e = record["ttft_s"], record["e2e_s"]
    assert isinstance(ttft, float)
    assert isinstance(e2e, float)
    assert 0 < ttft < e2e


def test_chat_is_split_too(build: Build) -> None:
    stack = build()
    body = {"model": "fake-model", "messages": [{"role": "user", "content": LONG}]}
    status, _, answer = stack.request("POST", "/v1/chat/completions", body)
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"]
    assert stack.engines["d0"].seen.decodes == 1


@pytest.mark.parametrize("more", [{"n": 2}, {"echo": True}, {"prompt_logprobs": 1}])
def test_what_cannot_be_split_is_served_locally(build: Build, more: dict[str, object]) -> None:
    stack = build()
    assert stack.complete(**more)[0] == 200
    assert stack.engines["p0"].seen.requests == 0
    assert stack.engines["d0"].seen.locals == 1


def test_unknown_fields_reach_both_workers_untouched(build: Build) -> None:
    stack = build()
    unknown = {"a": [1, 2.5, None, "\u00e9"], "b": {"c": True}}
    assert stack.complete(never_heard_of=unknown)[0] == 200
    for name in ("p0", "d0"):
        assert stack.engines[name].seen.bodies[-1]["never_heard_of"] == unknown


def test_client_cannot_reach_the_kv_path(build: Build) -> None:
    stack = build()
    forged = {"disagg": {"version": 1, "step": "decode", "ticket": "x"}}
    assert stack.complete(kv_transfer_params=forged)[0] == 200
    body = stack.engines["d0"].seen.bodies[-1]
    assert "kv_transfer_params" not in body
    assert stack.engines["p0"].seen.requests == 0


def test_headers_pass_but_hop_by_hop_ones_do_not(build: Build) -> None:
    stack = build()
    given = {
        "Authorization": "Bearer key",
        "X-Request-Id": "my-id.1",
        "X-Custom": "yes",
        "Connection": "keep-alive, X-Private",
        "X-Private": "hop",
        "TE": "trailers",
        "Accept-Encoding": "gzip",
    }
    body = {"model": "fake-model", "prompt": LONG, "max_tokens": 2}
    status, answered, _ = stack.request("POST", "/v1/completions", body, given)
    assert status == 200
    assert answered["x-request-id"] == "my-id.1"
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen.headers[-1]
        assert seen["authorization"] == "Bearer key"
        assert seen["x-request-id"] == "my-id.1"
        assert seen["x-custom"] == "yes"
        assert seen["host"] == stack.engines[name].url.removeprefix("http://")
        assert not {"x-private", "te", "accept-encoding", "connection"} & set(seen)


@pytest.mark.parametrize("given", ["x" * 200, "has blank", "\u00e9"])
def test_unsafe_request_id_is_replaced(build: Build, given: str) -> None:
    stack = build(d0="decode")
    body = {"model": "fake-model", "prompt": SHORT}
    headers = {"X-Request-Id": given.encode("utf-8").decode("latin-1")}
    _, answered, _ = stack.request("POST", "/v1/completions", body, headers)
    assert len(answered["x-request-id"]) == 32


def test_upstream_connections_are_kept(build: Build) -> None:
    stack = build()
    for _ in range(5):
        assert stack.complete()[0] == 200
    stack.wait_idle()
    assert stack.gateway.pools["d0"].counts()["idle"] <= 2
    assert "0 busy" in repr(stack.gateway.pools["d0"])


def test_answer_without_length_ends_with_its_connection(build: Build) -> None:
    how = Behaviour(close_delimited=True)
    stack = build(behaviours={"p0": how, "d0": Behaviour(close_delimited=True)})
    for stream in (False, True):
        status, body = stack.complete(stream=stream)
        assert status == 200
        assert body
    assert stack.engines["d0"].seen.decodes == 2


def test_missing_report_is_told(build: Build) -> None:
    stack = build()
    assert stack.complete()[0] == 200
    (record,) = stack.records(1)
    handoff = record["handoff"]
    assert isinstance(handoff, dict)
    assert handoff["report"] == "missing"
    assert record["split"] == "no: no report"
    assert stack.metric("disagg_split_not_happening", ("no report",)) == 1


def test_a_decode_worker_is_counted_from_the_decision_on(build: Build) -> None:
    stack = build(p0="prefill", d0="decode", behaviours={"p0": Behaviour(hang="head")})
    body = b'{"model": "fake-model", "prompt": "%b", "max_tokens": 7}' % LONG.encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    client = stack.raw(head % len(body) + body)
    d0 = stack.gateway.fleet.states["d0"]
    eventually(lambda: d0.requests == 1, "d0 is expected to answer")
    assert d0.output_tokens == 7
    assert d0.prompt_tokens == 0
    assert stack.engines["d0"].seen.requests == 0
    client.close()
    stack.wait_idle()
    assert (d0.requests, d0.output_tokens, d0.kv_tokens) == (0, 0, 0)
