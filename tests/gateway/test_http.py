"""The client side as HTTP: keep-alive, pipelining, limits, smuggling, garbage."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
from collections.abc import Callable

import psutil
import pytest

from tests.gateway.harness import SHORT, Stack, eventually, open_fds

Build = Callable[..., Stack]

BODY = json.dumps({"model": "fake-model", "prompt": SHORT, "max_tokens": 2}).encode()


def post(body: bytes = BODY, *lines: bytes, version: bytes = b"1.1") -> bytes:
    head = [
        b"POST /v1/completions HTTP/" + version,
        b"Host: x",
        b"Content-Length: %d" % len(body),
        *lines,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def answer_of(sock: socket.socket) -> tuple[http.client.HTTPResponse, bytes]:
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return answer, answer.read()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


@pytest.fixture
def stack(build: Build) -> Stack:
    return build(d0="decode", gateway={"client_idle_s": 0.5, "max_body_bytes": 4096})


def test_keep_alive_serves_many_requests(stack: Stack) -> None:
    sock = stack.raw()
    for _ in range(5):
        sock.sendall(post())
        answer, body = answer_of(sock)
        assert answer.status == 200
        assert json.loads(body)["choices"]
    assert len(stack.gateway.connections) == 1


def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    bodies = [
        json.dumps({"model": "fake-model", "prompt": f"p{i}", "max_tokens": i + 1}).encode()
        for i in range(4)
    ]
    sock = stack.raw(b"".join(post(b) for b in bodies[:3]))
    sock.sendall(post(bodies[3]))
    with sock.makefile("rb") as file:
        for i in range(4):
            assert file.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(file)
            body = file.read(int(headers["Content-Length"]))
            assert json.loads(body)["usage"]["completion_tokens"] == i + 1


def test_request_in_single_bytes(stack: Stack) -> None:
    sock = stack.raw()
    for i in range(0, len(post())):
        sock.sendall(post()[i : i + 1])
    assert answer_of(sock)[0].status == 200


def test_chunked_request_body(stack: Stack) -> None:
    half = len(BODY) // 2
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (BODY[:half], BODY[half:]))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    sock = stack.raw(head + chunks + b"0\r\n\r\n")
    assert answer_of(sock)[0].status == 200
    assert stack.engines["d0"].seen.bodies[-1] == json.loads(BODY)


def test_expect_continue(stack: Stack) -> None:
    whole = post(BODY, b"Expect: 100-continue")
    head, body = whole[: -len(BODY)], whole[-len(BODY) :]
    sock = stack.raw(head)
    assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(body)
    assert answer_of(sock)[0].status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_client_gets_an_answer_that_ends_with_the_connection(
    stack: Stack, stream: bool
) -> None:
    body = json.dumps(
        {"model": "fake-model", "prompt": SHORT, "max_tokens": 2, "stream": stream}
    ).encode()
    sock = stack.raw(post(body, version=b"1.0"))
    data = read_all(sock)
    assert data.startswith(b"HTTP/1.1 200")
    assert b"chunked" not in data
    assert data.endswith(b"data: [DONE]\n\n" if stream else b"}")


def test_connection_close_is_honoured(stack: Stack) -> None:
    data = read_all(stack.raw(post(BODY, b"Connection: close")))
    assert b"connection: close" in data.lower()


def test_upgrade_offer_is_declined_and_the_request_served(stack: Stack) -> None:
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA")
    sock = stack.raw(post(BODY, *offer))
    answer, body = answer_of(sock)
    assert answer.status == 200, body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(b"x" * 5000), 413),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"2000\r\n" + b"x" * 0x2000 + b"\r\n0\r\n\r\n", 413),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"y" * 200_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 300 + b"\r\n", 431),
        (b"GET /" + b"u" * 200_000, 431),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (post(BODY, b"Content-Length: 3"), 400),
        (post(BODY, b"Transfer-Encoding: chunked"), 400),
        (post(BODY, b"Transfer-Encoding: xchunked"), 400),
        (post(BODY, b"Bad Header: x"), 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_and_the_connection_closed(
    stack: Stack, data: bytes, status: int
) -> None:
    sock = stack.raw()
    sock.sendall(data)
    answer, body = answer_of(sock)
    assert answer.status == status
    assert json.loads(body)["error"]["message"]
    assert sock.recv(10) == b""
    assert stack.engines["d0"].seen.requests == 0


def test_smuggled_second_request_is_never_served(stack: Stack) -> None:
    inner = post(BODY)
    outer = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner
    )
    data = read_all(stack.raw(outer))
    assert len(re.findall(rb"HTTP/1.1 \d", data)) == 1
    assert stack.engines["d0"].seen.requests == 0


@pytest.mark.parametrize("sent", [b"", post()[:20], post()[:-1]])
def test_slow_client_is_cut_off_in_bounded_time(stack: Stack, sent: bytes) -> None:
    sock = stack.raw(sent)
    data = read_all(sock)
    assert data == b"" if not sent else b" 408 " in data.split(b"\r\n")[0]
    eventually(lambda: not stack.gateway.connections, "the connection is closed")


@pytest.mark.parametrize(
    ("raw", "says"),
    [(b"{", "not valid JSON"), (b"[]", "JSON object"), (b'{"prompt": 3}', "prompt must be")],
)
def test_malformed_json_is_400_in_openai_shape(stack: Stack, raw: bytes, says: str) -> None:
    sock = stack.raw(post(raw))
    answer, body = answer_of(sock)
    assert answer.status == 400
    assert says in json.loads(body)["error"]["message"]
    sock.sendall(post())
    assert answer_of(sock)[0].status == 200, "the connection goes on"


def mutate(rng: random.Random) -> bytes:
    data = bytearray(post())
    for _ in range(rng.randint(1, 8)):
        kind = rng.randrange(4)
        at = rng.randrange(len(data))
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 9)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        else:
            data[at:at] = rng.choice([b"\r\n", b"\r\n\r\n", b"\x00", b": ", b"chunked", b"0\r\n"])
    return bytes(data)


def test_garbage_neither_crashes_nor_grows_the_gateway(stack: Stack) -> None:
    rng = random.Random(7)
    process = psutil.Process()
    rss_after_first = 0
    for number in range(600):
        data = rng.randbytes(rng.randint(1, 400)) if number % 3 == 0 else mutate(rng)
        with socket.create_connection(("127.0.0.1", stack.port), timeout=5) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            try:
                first = sock.recv(65536)
            except ConnectionResetError:
                first = b""
            assert first == b"" or first.startswith(b"HTTP/1.1 "), first
        if number == 200:
            rss_after_first = process.memory_info().rss
    stack.wait_idle()
    eventually(lambda: not stack.gateway.connections, "all connections are closed")
    assert process.memory_info().rss - rss_after_first < 16 << 20
    assert open_fds() < 200
    assert stack.complete(SHORT)[0] == 200
