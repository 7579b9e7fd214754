"""Pretend engines that keep KV for each other and take an engine's time."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from disagg_plugins.testing.fake_engine import FakeEngine
from disagg_plugins.testing.pace import PROFILES
from disagg_plugins.testing.pacer import Pacer

FAST = 2000.0
"""Virtual seconds a second: an answer takes some milliseconds."""

Json = dict[str, object]
MakeEngine = Callable[..., FakeEngine]


def ask(engine: FakeEngine, prompt: str, **more: object) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=10)
    try:
        body = {"model": "m", "prompt": prompt, "max_tokens": 6, **more}
        connection.request("POST", "/v1/completions", json.dumps(body))
        return connection.getresponse().read()
    finally:
        connection.close()


def text_of(answer: bytes) -> str:
    return str(json.loads(answer)["choices"][0]["text"])


def streamed(answer: bytes) -> str:
    events = [e.removeprefix(b"data: ") for e in answer.split(b"\n\n") if e.startswith(b"data: {")]
    return "".join(json.loads(e)["choices"][0]["text"] for e in events)


def eventually(check: Callable[[], object]) -> None:
    end_s = time.monotonic() + 5
    while not check():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture
def engine_of() -> Iterator[MakeEngine]:
    with ExitStack() as stack:

        def make(lease_s: float = 5.0, speed: float = FAST, interval: int = 1) -> FakeEngine:
            pacer = Pacer(PROFILES["opt-13b-a100"], speed=speed)
            engine = FakeEngine(lease_s=lease_s, pacer=pacer, stream_interval=interval)
            return stack.enter_context(engine)

        yield make


def prefill(engine: FakeEngine, prompt: str, ticket: str) -> Json:
    params = {"disagg": {"version": 1, "step": "prefill", "ticket": ticket}}
    record: Json = json.loads(ask(engine, prompt, kv_transfer_params=params))["kv_transfer_params"]
    disagg = record["disagg"]
    assert isinstance(disagg, dict)
    return {"disagg": {**disagg, "step": "decode", "ticket": ticket}}


def test_a_paced_answer_is_the_answer_of_an_engine_without_a_pace(engine_of: MakeEngine) -> None:
    with FakeEngine() as plain:
        whole = text_of(ask(plain, "hello"))
    assert text_of(ask(engine_of(), "hello")) == whole
    assert streamed(ask(engine_of(interval=4), "hello", stream=True)) == whole


def test_a_handoff_is_taken_over_once(engine_of: MakeEngine) -> None:
    first, second = engine_of(), engine_of()
    params = prefill(first, "hello", "t1")
    assert first.open_things()["leases"] == 1
    whole = text_of(ask(second, "hello", kv_transfer_params=params))
    assert first.open_things()["leases"] == 0
    assert text_of(ask(second, "hello", kv_transfer_params=params)) == whole
    assert (second.seen.claimed, second.seen.not_claimed) == (1, 1)


def test_nixls_form_of_a_handoff_is_taken_over_too(engine_of: MakeEngine) -> None:
    first, second = engine_of(), engine_of()
    answer = ask(first, "hello", kv_transfer_params={"do_remote_decode": True})
    params = json.loads(answer)["kv_transfer_params"]
    ask(second, "hello", kv_transfer_params=params)
    assert (second.seen.decodes, second.seen.claimed) == (1, 1)


def test_the_kv_of_another_prompt_shows_in_the_answer(engine_of: MakeEngine) -> None:
    first, second = engine_of(), engine_of()
    params = prefill(first, "hello", "t1")
    answer = text_of(ask(second, "good day", kv_transfer_params=params))
    assert answer == text_of(ask(second, "hello"))
    assert answer != text_of(ask(second, "good day"))


def test_a_lease_that_nobody_takes_ends(engine_of: MakeEngine) -> None:
    engine = engine_of(lease_s=0.02)
    prefill(engine, "hello", "t1")
    assert engine.leases is not None
    eventually(lambda: engine.leases is not None and engine.leases.expired == 1)
    assert engine.open_things()["leases"] == 0


def test_a_client_that_goes_frees_its_place(engine_of: MakeEngine) -> None:
    engine = engine_of(speed=1.0)
    body = json.dumps({"prompt": "hello", "max_tokens": 10_000, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.create_connection(("127.0.0.1", engine.port), timeout=5) as sock:
        sock.sendall(head + body)
        eventually(lambda: engine.open_things()["jobs"] == 1)
    eventually(lambda: engine.open_things()["jobs"] == 0)
    assert engine.seen.aborted == 1
