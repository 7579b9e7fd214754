"""What one bad request, client, worker or disk must not do to everybody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.gateway import endpoints
from disagg_plugins.gateway.openai import CHAT, COMPLETIONS, parse_request
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.policy import GatewayPolicy
from disagg_plugins.telemetry.records import RecordFile
from disagg_plugins.telemetry.reports import report_key, sign
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_vllm.dialect import VllmDialect
from tests.gateway.harness import LONG, SECRET, SHORT, Stack, eventually, free_port
from tests.telemetry.test_records import record

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef, Published

Build = Callable[..., Stack]


def post(body: bytes, lines: bytes = b"") -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n"
    return head % (lines, len(body)) + body


def read_for(sock: socket.socket, wait_s: float) -> bytes:
    """Read until the peer closes or is silent for ``wait_s``."""
    sock.settimeout(wait_s)
    out = b""
    try:
        while data := sock.recv(65536):
            out += data
    except TimeoutError:
        pass
    return out


class FailingDialect(VllmDialect):
    """Raises where a bug would: while a body is made, or while an answer is read."""

    where = ""

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(f"injected in {where}")

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        self._fail("prefill_body")
        return super().prefill_body(body, ref)

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        self._fail("published")
        return super().published(answer, ref)

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        self._fail("decode_body")
        return super().decode_body(body, ref, published)


class FailingPlugin:
    def __init__(self) -> None:
        self.dialect = FailingDialect()

    @hookimpl
    def disagg_register_dialects(self) -> list[VllmDialect]:
        return [self.dialect]


@pytest.mark.parametrize("where", ["prefill_body", "published", "decode_body"])
def test_exception_while_a_request_is_handled_leaves_nothing_behind(
    build: Build, where: str
) -> None:
    plugin = FailingPlugin()
    stack = build(dialects=plugin, gateway={"max_requests": 2})
    plugin.dialect.where = where
    for _ in range(3):
        status, body = stack.complete(LONG)
        assert status == 500
        assert json.loads(body)["error"]["code"] == "internal"
    stack.wait_idle()
    eventually(lambda: len(stack.gateway.ledger) == 0, "no handoff is open")
    plugin.dialect.where = ""
    assert stack.complete(LONG)[0] == 200
    found = stack.records(4)
    assert [r["outcome"] for r in found] == ["error"] * 3 + ["ok"]
    assert found[0]["status"] == 500
    assert "injected" in found[0]["failures"][0]["detail"]  # type: ignore[index]


@pytest.mark.parametrize("where", ["prefill_body", "decode_body"])
def test_failed_request_never_writes_into_a_later_answer(build: Build, where: str) -> None:
    plugin = FailingPlugin()
    stack = build(
        dialects=plugin,
        gateway={"prefill_s": 0.3, "first_byte_s": 0.3},
        behaviours={"d0": Behaviour(chunk_s=0.1)},
    )
    plugin.dialect.where = where
    sock = stack.raw(post(json.dumps({"prompt": LONG}).encode()))
    answer = sock.recv(65536)
    assert b" 500 " in answer[:20]
    plugin.dialect.where = ""
    victim = {"prompt": SHORT, "max_tokens": 8, "stream": True}
    sock.sendall(post(json.dumps(victim).encode()))
    out = read_for(sock, 0.6)
    assert out.count(b"HTTP/1.1") == 1
    assert out.endswith(b"0\r\n\r\n")


def test_exception_inside_a_stream_breaks_it_visibly(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disagg_plugins.gateway.exchange import Exchange

    stack = build(d0="decode")

    def broken(self: Exchange, sse: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Exchange, "_stream_end", broken)
    with pytest.raises(http.client.IncompleteRead):
        stack.complete(SHORT, stream=True)
    stack.wait_idle()
    (found,) = stack.records(1)
    assert found["outcome"] == "broken"


def test_revoked_reply_writes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the replies of ended requests and writes with them while another one streams."""
    from disagg_plugins.gateway.client_connection import ClientConnection
    from disagg_plugins.gateway.reply import Reply

    kept: list[Reply] = []
    writers: list[Callable[[bytes], None]] = []
    make = ClientConnection.answering

    def keeping(self: ClientConnection, by: object) -> Reply:
        kept.append(make(self, by))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(ClientConnection, "answering", keeping)
    raw_writer = Reply.raw_writer

    def keep_writer(self: Reply) -> Callable[[bytes], None] | None:
        writer = raw_writer(self)
        if writer is not None:
            writers.append(writer)
        return writer

    monkeypatch.setattr(Reply, "raw_writer", keep_writer)
    stack = build(d0="decode", behaviours={"d0": Behaviour(chunk_s=0.02)})
    body = json.dumps({"prompt": SHORT, "max_tokens": 10, "stream": True}).encode()
    sock = stack.raw(post(body))
    eventually(lambda: len(stack.gateway.recent) == 1, "the first request is over")
    first = read_for(sock, 0.1)
    sock.sendall(post(body))
    eventually(lambda: len(kept) == 2 and len(writers) == 2, "the second one streams")

    def intrude() -> None:
        stale = kept[0]
        stale.write(b"INTRUDER")
        stale.answer(200, b"INTRUDER")
        stale.start(200, b"", b"INTRUDER")
        stale.complete(b"INTRUDER")
        stale.break_off(b"INTRUDER")
        stale.abort()
        writers[0](b"INTRUDER")

    stack.call(intrude)
    second = read_for(sock, 0.5)
    assert b"INTRUDER" not in second
    assert (first.count(b"HTTP/1.1"), second.count(b"HTTP/1.1")) == (1, 1)
    assert second.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("depth", [200, 960, 980, 990, 1000, 100_000])
def test_deep_nesting_is_400(build: Build, depth: int) -> None:
    stack = build()
    raw = b'{"kv_transfer_params":null,"prompt":"hi","x":' + b"[" * depth + b"]" * depth + b"}"
    status, _, body = stack.request("POST", "/v1/completions", raw)
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_json"
    stack.wait_idle()


def test_brackets_inside_strings_are_not_nesting() -> None:
    text = json.dumps({"prompt": "[{" * 500 + '\\"[\\' + "[" * 500, "x": [[1]]})
    parsed = parse_request(COMPLETIONS, text.encode(), chars_per_token=4.0)
    assert parsed.prompt_tokens > 300


def test_fields_nobody_reads_pass_byte_for_byte(build: Build) -> None:
    stack = build()
    odd = b'{"b" : 1.50, "a":[1e2, 12345678901234567890123, "\\u00e4"]}'
    prompt = json.dumps(LONG).encode()
    sent = b'{"prompt":%b,"odd":%b,"max_tokens":2}' % (prompt, odd)
    body = parse_request(COMPLETIONS, sent, chars_per_token=4.0).body
    import msgspec

    assert odd in msgspec.json.encode(dict(body))
    assert stack.request("POST", "/v1/completions", sent)[0] == 200
    prefill, decode = stack.engines["p0"].seen.bodies[-1], stack.engines["d0"].seen.bodies[-1]
    assert prefill["odd"] == decode["odd"] == json.loads(odd)
    assert prefill["prompt"] == decode["prompt"] == LONG


def test_body_gives_plain_values_and_keeps_null() -> None:
    raw = b'{"prompt":"x","n":2,"kv_transfer_params":null,"vllm_xargs":{"a":[1]}}'
    body = parse_request(COMPLETIONS, raw, chars_per_token=4.0).body
    assert body.get("kv_transfer_params", 1) is None
    assert body["vllm_xargs"] == {"a": [1]}
    assert (body.get("n"), body.get("none"), body.get("none", 7)) == (2, None, 7)


MIB = 1 << 20
ADVERSARIAL = {
    "keys": lambda n: b'{"prompt":"x",' + b",".join(b'"%x":1' % i for i in range(n // 9)) + b"}",
    "arrays": lambda n: b'{"prompt":[' + b"[]," * (n // 3 - 8) + b"[1]]}",
    "ints": lambda n: b'{"prompt":[' + b"1," * (n // 2 - 8) + b"1]}",
    "strings": lambda n: b'{"prompt":[' + b'"",' * (n // 3 - 8) + b'""]}',
    "messages": lambda n: b'{"messages":[' + b"{}," * (n // 3 - 8) + b"{}]}",
    "parts": lambda n: b'{"messages":[{"content":[' + b'"",' * (n // 3 - 20) + b'""]}]}',
    "quotes": lambda n: b'{"prompt":"x","x":[' + b'"\\"",' * (n // 5 - 8) + b"1]}",
    "deep": lambda n: b'{"prompt":"x","x":[' + (b"[" * 60 + b"]" * 60 + b",") * (n // 121 - 1)
    + b"1]}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_largest_body_does_not_stop_the_loop_for_long(kind: str) -> None:
    """Half a second leaves room for slow machines; it took up to three before."""
    size_bytes = GatewayPolicy().max_body_bytes
    assert size_bytes <= 4 * MIB
    raw = ADVERSARIAL[kind](size_bytes)
    endpoint = CHAT if b'"messages"' in raw[:20] else COMPLETIONS
    began_s = time.thread_time()
    with contextlib.suppress(RequestError):
        parsed = parse_request(endpoint, raw, chars_per_token=4.0)
        if parsed.opaque is None:
            VllmDialect().unsplittable(parsed.body)
    assert time.thread_time() - began_s < 0.5


def test_body_too_crowded_to_read_is_served_locally(build: Build) -> None:
    stack = build()
    messages = [{"role": "user", "content": "x"}] * 70_000
    raw = json.dumps({"messages": messages, "max_tokens": 2}).encode()
    assert len(raw) < GatewayPolicy().max_body_bytes
    assert stack.request("POST", "/v1/chat/completions", raw)[0] == 200
    (found,) = stack.records(1)
    assert found["route"] == "local"


def test_trailers_reach_nobody(build: Build) -> None:
    stack = build(d0="decode")
    body = json.dumps({"prompt": "hi", "max_tokens": 2}).encode()
    stack_head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer mine\r\n"
    chunks = b"%x\r\n%b\r\n0\r\nX-User: admin\r\nAuthorization: Bearer smuggled\r\n\r\n"
    sock = stack.raw(
        stack_head + b"transfer-encoding: chunked\r\n\r\n" + chunks % (len(body), body)
    )
    assert b" 200 " in sock.recv(65536)[:20]
    seen = stack.engines["d0"].seen.headers[-1]
    assert seen["authorization"] == "Bearer mine"
    assert "x-user" not in seen


def test_endless_trailers_are_refused(build: Build) -> None:
    stack = build(d0="decode")
    sock = stack.raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n")
    sock.sendall(b"\r\n2\r\n{}\r\n0\r\n" + b"a: %b\r\n" % (b"x" * 1000) * 200)
    assert b" 431 " in sock.recv(65536)[:20]


@contextmanager
def stalled_fifo(path: Path) -> Iterator[int]:
    """A file whose writes block for ever once 64 KiB are written."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    done = threading.Event()

    def drain() -> None:
        while not done.wait(0.01):
            try:
                while os.read(reader, 1 << 20):
                    pass
            except BlockingIOError:
                pass

    try:
        yield reader
    finally:
        helper = threading.Thread(target=drain)  # lets the writing thread end
        helper.start()
        eventually(
            lambda: not any(t.name == "records" for t in threading.enumerate()), "writer ended"
        )
        done.set()
        helper.join()
        os.close(reader)


def test_stalled_disk_stops_neither_deadlines_nor_the_shutdown(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disagg_plugins.gateway import server

    monkeypatch.setattr(server, "RECORDS_S", 0.3)
    with stalled_fifo(tmp_path / "records.jsonl"):
        stack = build(gateway={"first_byte_s": 0.3, "drain_s": 0.3}, d0="decode")
        for i in range(300):
            stack.gateway._settle(record(f"r{i}" * 50))
        eventually(lambda: any(t.name == "records" for t in threading.enumerate()), "a flush")
        stack.engines["d0"].behaviour = Behaviour(hang="head")
        began_s = time.monotonic()
        assert stack.request("POST", "/v1/completions", {"prompt": "x"})[0] == 504
        assert time.monotonic() - began_s < 3.0
        stack.request_stop()
        stack._thread.join(5.0)
        assert not stack._thread.is_alive()


def test_records_close_is_bounded_and_starts_no_second_writer(tmp_path: Path) -> None:
    with stalled_fifo(tmp_path / "fifo"):
        file = RecordFile(tmp_path / "fifo")
        for i in range(1000):
            file.add(record(f"r{i}"))
        file.flush_soon()
        eventually(lambda: not file._pending, "the writer took them")
        file.flush_soon()
        file.add(record("late"))
        began_s = time.monotonic()
        assert not file.close(0.2)
        assert not file.close(0.2)
        assert time.monotonic() - began_s < 2.0
        assert [t.name for t in threading.enumerate()].count("records") == 1


@pytest.mark.parametrize("part", ["exchange", "client", "ledger", "pool"])
def test_exception_in_a_sweep_does_not_end_the_gateway(
    build: Build, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from disagg_plugins.gateway.client_connection import ClientConnection
    from disagg_plugins.gateway.exchange import Exchange
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.telemetry.ledger import HandoffLedger

    failed = threading.Event()

    def broken(*_: object) -> None:
        failed.set()
        raise RuntimeError("injected")

    target, name = {
        "exchange": (Exchange, "_expire_decode"),
        "client": (ClientConnection, "expire"),
        "ledger": (HandoffLedger, "sweep"),
        "pool": (WorkerPool, "sweep"),
    }[part]
    monkeypatch.setattr(target, name, broken)
    monkeypatch.setattr("disagg_plugins.gateway.server.POOL_SWEEP_S", 0.05)
    stack = build(
        gateway={"first_byte_s": 0.2, "client_idle_s": 0.2},
        behaviours={"d0": Behaviour(hang="head", times=1)},
        d0="decode",
    )
    if part == "exchange":
        assert stack.complete(SHORT)[0] == 500
        stack.wait_idle()
    sock = stack.raw()
    assert failed.wait(5.0)
    if part == "client":
        assert read_for(sock, 2.0) == b""
        eventually(lambda: not stack.gateway.connections, "the connection is gone")
    stack.engines["d0"].behaviour = Behaviour()
    assert stack.complete(SHORT)[0] == 200


@pytest.mark.parametrize("ahead_bytes", [0, 100_000, 1_000_000])
@pytest.mark.parametrize("streaming", [True, False])
def test_client_that_sent_ahead_and_left_is_noticed(
    build: Build, ahead_bytes: int, streaming: bool
) -> None:
    how = Behaviour(chunk_s=0.05) if streaming else Behaviour(hang="head")
    stack = build(d0="decode", behaviours={"d0": how})
    body = {"prompt": "x", "max_tokens": 2000, "stream": True}
    sock = stack.raw(post(json.dumps(body).encode()))
    eventually(lambda: len(stack.gateway.active) == 1, "the request runs")
    sock.sendall(b"A" * ahead_bytes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    eventually(lambda: not stack.gateway.active, "the request is over", 2.0)
    eventually(lambda: stack.engines["d0"].seen.aborted == 1, "the worker was told", 2.0)


def test_status_is_for_this_host_and_for_holders_of_the_secret(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = build()
    path = "/internal/status"
    assert stack.request("GET", path)[0] == 200
    status, _, body = stack.request("GET", path, headers={"X-Forwarded-For": "10.0.0.9"})
    assert status == 403
    monkeypatch.setattr(endpoints, "same_host", lambda *_: False)
    status, _, body = stack.request("GET", path)
    assert status == 403
    assert "signed" in json.loads(body)["error"]["message"]
    assert b"127.0.0.1:" not in body
    assert stack.request("GET", "/metrics")[0] == 200
    for secret, expected in ((SECRET, 200), (b"another secret of 32 bytes......", 403)):
        proof = sign(report_key(secret), b"", time.time())
        assert stack.request("GET", path, headers={"X-Disagg-Signature": proof})[0] == expected


@pytest.mark.parametrize(
    ("peer", "here", "same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("::ffff:10.0.0.6", "::ffff:10.0.0.5", False),
        (None, None, False),
        ("nonsense", "10.0.0.5", False),
    ],
)
def test_same_host(peer: str | None, here: str | None, same: bool) -> None:
    assert endpoints.same_host(peer, here) is same


class ScriptedWorker:
    """Answers completions with fixed chunks, each in a write of its own."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as file:
            while line := file.readline():
                length = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                file.read(length)
                self._answer(sock, line)

    def _answer(self, sock: socket.socket, line: bytes) -> None:
        if line.startswith(b"GET"):
            body = b'{"data":[{"id":"fake-model"}]}'
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            return
        sock.sendall(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for chunk in [*self._chunks, b""]:
            threading.Event().wait(0.05)  # so that each is read alone
            sock.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(5.0)


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()


def test_last_event_and_end_mark_in_one_chunk(build: Build) -> None:
    chunks = [event("a"), event("b"), event("c", "stop") + b"data: [DONE]\n\n"]
    worker = ScriptedWorker(chunks)
    try:
        stack = build(d0="decode", absent=("d0",), port_of={"d0": worker.port})
        stack.wait_healthy("d0")
        status, body = stack.complete(SHORT, stream=True)
        assert status == 200
        assert body == b"".join(chunks)
        (found,) = stack.records(1)
        assert (found["outcome"], found["finish"]) == ("ok", "stop")
        stack.stop()
    finally:
        worker.close()
