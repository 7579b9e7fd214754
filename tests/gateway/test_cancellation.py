"""A client that goes away takes its work with it; a slow client costs no memory."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Callable
from typing import Literal

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, eventually, open_fds

Build = Callable[..., Stack]


def request(prompt: str, *, stream: bool = True, max_tokens: int = 1000) -> bytes:
    body = json.dumps(
        {"model": "fake-model", "prompt": prompt, "stream": stream, "max_tokens": max_tokens}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


def busy(stack: Stack, name: str) -> bool:
    return stack.gateway.pools[name].counts()["busy"] == 1 and bool(
        stack.engines[name].seen.requests
    )


def leave(stack: Stack, sock: socket.socket) -> None:
    """Close the client's socket and wait until nothing is left of its request."""
    sock.close()
    stack.wait_idle()
    eventually(lambda: not stack.gateway.connections, "the client connection is gone")


def test_client_gone_during_prefill_aborts_prefill(build: Build) -> None:
    stack = build(behaviours={"p0": Behaviour(hang="head")})
    sock = stack.raw(request(LONG))
    eventually(lambda: busy(stack, "p0"), "prefill works")
    leave(stack, sock)
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill sees the abort")
    assert stack.engines["d0"].seen.requests == 0


def test_client_gone_before_the_first_byte_aborts_decode(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(hang="head")})
    sock = stack.raw(request(LONG))
    eventually(lambda: busy(stack, "d0"), "decode works")
    leave(stack, sock)
    eventually(lambda: stack.engines["d0"].seen.aborted == 1, "decode sees the abort")


@pytest.mark.parametrize("prompt", [LONG, SHORT])
def test_client_gone_inside_the_stream_aborts_decode(build: Build, prompt: str) -> None:
    stack = build(behaviours={"d0": Behaviour(chunk_s=0.01)})
    sock = stack.raw(request(prompt))
    assert sock.recv(1000)
    leave(stack, sock)
    eventually(lambda: stack.engines["d0"].seen.aborted == 1, "decode sees the abort")
    (record,) = stack.records(1)
    assert record["client_gone"] is True
    assert record["outcome"] == "client_gone"
    assert stack.metric("disagg_failures") == 0
    assert stack.metric("disagg_split_not_happening") == 0


@pytest.mark.parametrize("prompt", [LONG, SHORT])
@pytest.mark.parametrize(
    ("end", "hang_after"), [(b"[DONE]", "DONE"), (b'"finish_reason":"length"', "finish")]
)
def test_client_that_leaves_with_its_whole_answer_is_ok(
    build: Build, prompt: str, end: bytes, hang_after: Literal["DONE", "finish"]
) -> None:
    stack = build(behaviours={"d0": Behaviour(hang_after=hang_after, chunk_s=0.01)})
    sock = stack.raw(request(prompt, max_tokens=16))
    received = b""
    while end not in received:
        received += sock.recv(1 << 16)
    leave(stack, sock)
    (record,) = stack.records(1)
    assert (record["outcome"], record["client_gone"]) == ("ok", False)
    assert record["finish"] == "length"
    assert 1 <= record["itl"]["count"] <= 15  # type: ignore[index]
    assert stack.metric("disagg_failures") == 0


def test_client_that_leaves_one_of_several_answers_is_gone(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(hang_after="finish")})
    body = json.dumps({"prompt": SHORT, "stream": True, "max_tokens": 4, "n": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    received = b""
    while b'"finish_reason":"length"' not in received:
        received += sock.recv(1 << 16)
    leave(stack, sock)
    (record,) = stack.records(1)
    assert record["outcome"] == "client_gone"


def test_client_gone_while_its_request_is_incomplete(build: Build) -> None:
    stack = build()
    sock = stack.raw(request(LONG)[:-10])
    eventually(lambda: bool(stack.gateway.connections), "the client is connected")
    leave(stack, sock)
    assert stack.engines["p0"].seen.requests == 0


def test_cancelled_requests_leave_no_descriptor(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(chunk_s=0.005)})
    for _ in range(2):  # the first round opens what is kept
        before = open_fds()
        for prompt in (LONG, SHORT) * 10:
            sock = stack.raw(request(prompt))
            assert sock.recv(100)
            sock.close()
        stack.wait_idle()
        eventually(lambda: not stack.gateway.connections, "all clients are gone")
    # a probe may be under way on either count; a leak would be one for each of 20 requests
    eventually(lambda: open_fds() <= before + 6, f"descriptors are back at {before}")


def test_slow_client_stops_the_reading_and_memory_stays_bounded(build: Build) -> None:
    stack = build(d0="decode")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", stack.port))
    sock.sendall(request(SHORT, max_tokens=100_000))
    eventually(lambda: len(stack.gateway.active) == 1, "the request runs")
    (client,) = stack.gateway.connections
    eventually(lambda: client.transport.get_write_buffer_size() > 0, "bytes wait for the client")
    sizes = [client.transport.get_write_buffer_size() for _ in range(1000)]
    assert max(sizes) < 1 << 20
    sock.settimeout(10)
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received = received[-10:] + sock.recv(1 << 20)
    sock.close()
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["outcome"] == "ok"


def test_client_that_stops_reading_is_cut_off(build: Build) -> None:
    stack = build(d0="decode", gateway={"idle_s": 0.3})
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", stack.port))
    sock.sendall(request(SHORT, max_tokens=100_000))
    eventually(lambda: len(stack.gateway.active) == 1, "the request runs")
    stack.wait_idle()
    eventually(lambda: not stack.gateway.connections, "the client is cut off")
    sock.close()


def test_many_open_streams_end_cleanly(build: Build) -> None:
    stack = build(d0="decode", behaviours={"d0": Behaviour(chunk_s=0.2)})
    sockets = [stack.raw(request(SHORT, max_tokens=10_000)) for _ in range(200)]
    eventually(lambda: len(stack.gateway.active) == 200, "all run")
    for sock in sockets:
        assert sock.recv(10)
    for sock in sockets:
        sock.close()
    stack.wait_idle()
    eventually(lambda: stack.engines["d0"].seen.aborted == 200, "all are aborted")


def test_finished_requests_are_not_kept_alive(build: Build) -> None:
    from disagg_plugins.gateway.exchange import Exchange

    stack = build()
    for _ in range(20):
        assert stack.complete()[0] == 200
    stack.wait_idle()
    eventually(lambda: len(stack.gateway.ledger) == 0, "all handoffs are settled")
    gc.collect()
    # not isinstance: it asks proxies of other libraries for their class, which may warn
    alive = [o for o in gc.get_objects() if type(o) is Exchange]
    assert len(alive) <= 2, [gc.get_referrers(o) for o in alive]
