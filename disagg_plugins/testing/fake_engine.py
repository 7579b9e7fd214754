"""A fast pretend engine: speaks vLLM's HTTP, computes nothing, misbehaves on demand.

Each token depends on the prompt and on every token before it, so a split answer can be compared
with a local one, and an answer that goes on from wrong ids shows it. Asked for token ids it tells
them, and it goes on with an answer whose ids follow those of its prompt. It runs in a thread of its
own (``with FakeEngine() as engine``) or as a process::

    python -m disagg_plugins.testing.fake_engine --port 8101 --tokens 16

With ``--profile`` it takes a measured engine's time (``pace.py``); with ``--workers`` one process
holds many of them, on ports that follow ``--port-base``.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import httptools
import msgspec

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.testing.course import Course
from disagg_plugins.testing.leases import Leases
from disagg_plugins.testing.seen import Seen
from disagg_plugins.testing.tokens import Tokens, prompt_ids, read_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from disagg_plugins.telemetry.reports import Reporter
    from disagg_plugins.testing.pacer import Pacer

Json = dict[str, object]

MAX_TOKENS_SERVED = 100_000
START_TIMEOUT_S = 10.0
STOP_S = 5.0  # how long the end waits for connections that are accepted and not made yet


@dataclass(slots=True)
class Behaviour:
    """How the engine answers completions.

    Attributes:
        status: Answer with this status and an error body.
        hang: Say nothing: at all (``head``), or after ``after_chunks`` chunks (``stream``).
        hang_after: Say nothing after the last token (``finish``) or the end mark (``DONE``).
        close: Close the connection: at once (``head``), or after ``after_chunks`` chunks
            (``stream``), or inside the event that follows them (``event``).
        after_chunks: See ``hang`` and ``close``.
        garbage: Answer something that is not JSON (``body``) or not HTTP (``http``).
        no_params: A prefill answer without handoff parameters.
        no_done: End a stream without ``[DONE]``.
        error_event: Begin a stream with an error event of this code.
        error_inside: End a stream with an error event of this code, after ``after_chunks`` chunks.
        odd_chars: Every token but the first of three is a part of one character, as a byte is.
        more_read: Tokens that it reads besides a prompt's ids.
        first_s: Wait before answering, in seconds.
        chunk_s: Wait between chunks, in seconds.
        tokens: Tokens of an answer; None: what the request bounds, 8 without a bound.
        close_delimited: End answers by closing instead of framing them.
        times: Misbehave for so many requests only; None: always.
        then: How later requests are answered; None: without fault.
    """

    status: int | None = None
    hang: Literal["head", "stream"] | None = None
    hang_after: Literal["finish", "DONE"] | None = None
    close: Literal["head", "stream", "event"] | None = None
    after_chunks: int = 2
    garbage: Literal["body", "http"] | None = None
    no_params: bool = False
    no_done: bool = False
    error_event: int | None = None
    error_inside: int | None = None
    odd_chars: bool = False
    more_read: int = 0
    first_s: float = 0.0
    chunk_s: float = 0.0
    tokens: int | None = None
    close_delimited: bool = False
    times: int | None = None
    then: Behaviour | None = None


class FakeEngine:
    """One pretend worker.

    Args:
        model: The model it claims to serve.
        port: Where to listen; 0: anywhere free.
        behaviour: How it answers; may be replaced while it runs.
        secret: With it, tickets are checked and reports name their handoff.
        reporter: Takes ``published``, ``loaded`` and ``ended`` reports.
        lease_s: With it, a prefill keeps its KV so long, and a decode takes it from there.
        pacer: With it, tokens take time, whatever ``behaviour`` says of waiting.
        stream_interval: With a pacer, tokens of one piece of a stream after its first.

    Attributes:
        switch_status: How it answers when it is told its role; None: not at all.
        switches: The roles that it took.
    """

    def __init__(
        self,
        *,
        model: str = "fake-model",
        port: int = 0,
        behaviour: Behaviour | None = None,
        secret: bytes | None = None,
        reporter: Reporter | None = None,
        lease_s: float | None = None,
        pacer: Pacer | None = None,
        stream_interval: int = 1,
    ) -> None:
        self.model = model
        self.port = port
        self.behaviour = behaviour or Behaviour()
        self.secret = secret
        self.reporter = reporter
        self.leases = Leases(lease_s) if lease_s is not None else None
        self.pacer = pacer
        self.stream_interval = stream_interval
        self.seen = Seen()
        self.healthy = True
        self.switch_status: int | None = 200
        self.switches: list[str] = []
        self.connections: set[_Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeEngine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, in a thread; returns once connections are accepted."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.serve(ready)), name="fake-engine", daemon=True
        )
        self._thread.start()
        if not ready.wait(START_TIMEOUT_S):
            raise RuntimeError(f"the fake engine did not start within {START_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """Close every connection and end the thread; idempotent."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        if self._thread is not None:
            self._thread.join(START_TIMEOUT_S)

    async def serve(self, ready: threading.Event | None = None) -> None:
        """Serve on the running loop until stopped."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        sock = socket.create_server(("127.0.0.1", self.port), backlog=2048)
        self.port = sock.getsockname()[1]
        server = await self._loop.create_server(lambda: _Connection(self), sock=sock)
        if ready is not None:
            ready.set()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._stop.wait()
        finally:
            # A closed asyncio server drops what it has accepted and not made yet, sockets open.
            self._loop.remove_reader(sock)
            if self.pacer is not None:
                self.pacer.stop()
            if self.leases is not None:
                self.leases.clear()
            await self._close_all()
            server.close()

    async def _close_all(self) -> None:
        """Close every connection, those too that were accepted and are not made yet.

        asyncio makes an accepted connection in a task of its own. Cancelled before its first step,
        that task would leave the socket open for ever.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + STOP_S
        quiet = 0
        while quiet < 3 and loop.time() < end_s:
            for connection in list(self.connections):
                connection.transport.abort()
            quiet = 0 if self.connections or len(asyncio.all_tasks()) > 1 else quiet + 1
            await asyncio.sleep(0.005)

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run something beside the connections; it ends before the engine does."""
        if self._tasks is None:
            raise LocalProtocolError("an engine that does not serve runs nothing")
        self._tasks.create_task(work)

    def open_things(self) -> dict[str, float]:
        """Return what is there now and should be gone when nobody asks anything."""
        return {
            "leases": len(self.leases) if self.leases is not None else 0,
            "connections": len(self.connections),
            "answering": sum(c.answering for c in self.connections),
            "jobs": len(self.pacer) if self.pacer is not None else 0,
            "late_s": self.pacer.late_s if self.pacer is not None else 0.0,
        }

    def take_behaviour(self) -> Behaviour:
        """Return the behaviour for one request."""
        behaviour = self.behaviour
        while behaviour.times is not None:
            if behaviour.times > 0:
                behaviour.times -= 1
                break
            plain = Behaviour(tokens=behaviour.tokens, chunk_s=behaviour.chunk_s)
            behaviour = behaviour.then or plain
        return behaviour

    def report(self, step: str, ticket: object, tokens: int) -> None:
        """Report what a real worker would."""
        if self.secret is None or self.reporter is None or not isinstance(ticket, str):
            return
        handoff_id = verify(self.secret, ticket, time.time()).handoff_id
        send = self.reporter.send
        size_bytes = tokens * 1024
        if step == "prefill":
            send(
                {"kind": "published", "handoff_id": handoff_id, "num_tokens": tokens,
                 "bytes": size_bytes, "seconds": 0.001}
            )  # fmt: skip
            return
        send(
            {"kind": "loaded", "handoff_id": handoff_id, "num_tokens": tokens - 1,
             "tokens_recomputed": 1, "bytes": size_bytes, "transport": "shm", "form": "native",
             "seconds": 0.001}
        )  # fmt: skip
        send({"kind": "ended", "handoff_id": handoff_id, "outcome": "consumed"})


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body = b""
        self.answering = False
        self._timer: asyncio.TimerHandle | None = None
        self._answer: _Answer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._engine.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self.answering:
            self._engine.seen.aborted += 1
            self.answering = False
        if self._answer is not None:
            self._answer.course.stop()
            self._answer = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._headers, self._body = b"", {}, b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        engine = self._engine
        if self._url == b"/health":
            self._json(200 if engine.healthy else 503, {})
        elif self._url == b"/v1/models":
            card = {"id": engine.model, "object": "model", "owned_by": "fake"}
            self._json(200, {"object": "list", "data": [card]})
        elif self._url == b"/pd_role_switch":
            self._switch(msgspec.json.decode(self._body))
        elif self._url == b"/seen":
            seen = engine.seen
            self._json(
                200,
                {
                    "requests": seen.requests,
                    "prefills": seen.prefills,
                    "decodes": seen.decodes,
                    "locals": seen.locals,
                    "completed": seen.completed,
                    "aborted": seen.aborted,
                    "claimed": seen.claimed,
                    "not_claimed": seen.not_claimed,
                    **engine.open_things(),
                },
            )
        elif self._url == b"/behave":
            engine.behaviour = msgspec.json.decode(self._body, type=Behaviour)
            self._json(200, {})
        elif self._url.startswith(b"/kv/"):
            seed = engine.leases.take(self._url[4:].decode()) if engine.leases else None
            self._json(404 if seed is None else 200, seed)
        elif not self._url.partition(b"?")[0].endswith(b"completions"):
            self._json(404, {"error": {"message": "a fake engine has no such path"}})
        else:
            self._completion(msgspec.json.decode(self._body))

    def _switch(self, body: Json) -> None:
        """Take a role as SGLang does; ``switch_status`` None: say nothing."""
        engine = self._engine
        if engine.switch_status is None:
            return
        if engine.switch_status == 200:
            engine.switches.append(str(body.get("new_role")))
        said = {"success": engine.switch_status == 200, "message": "as it was told to answer"}
        self._json(engine.switch_status, said)

    def _json(self, status: int, value: object, *, framed: bool = True) -> None:
        body = msgspec.json.encode(value)
        length = b"content-length: %d\r\n" % len(body) if framed else b""
        self.transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%b\r\n%b" % (status, length, body)
        )
        if not framed:
            self.transport.close()

    def _completion(self, body: Json) -> None:
        seen = self._engine.seen
        seen.requests += 1
        seen.bodies.append(body)
        seen.headers.append(self._headers)
        answer = _Answer(self, self._engine, body, self._url.endswith(b"chat/completions"))
        self.answering = True
        self._answer = answer
        self.later(answer.behaviour.first_s, answer.course.start)

    def later(self, wait_s: float, do: Callable[[], None]) -> None:
        if wait_s > 0:
            self._timer = asyncio.get_running_loop().call_later(wait_s, do)
        else:
            do()

    def done(self) -> None:
        self.answering = False
        self._engine.seen.completed += 1

    def error(self, status: int, message: str) -> None:
        self.answering = False
        self._json(status, {"error": {"message": message, "type": "fake", "code": status}})

    def whole(self, value: object, *, framed: bool) -> None:
        self.done()
        self._json(200, value, framed=framed)


class _Answer:
    """One answer in the making."""

    def __init__(self, to: _Connection, engine: FakeEngine, body: Json, chat: bool) -> None:
        self._to = to
        self._engine = engine
        self._body = body
        self._chat = chat
        self.behaviour = engine.take_behaviour()
        prompt = msgspec.json.encode(body.get("messages") if chat else body.get("prompt"))
        self._seed = zlib.crc32(prompt)
        self._prompt_tokens = max(2, len(prompt) // 4)
        bound = self.behaviour.tokens or body.get("max_completion_tokens") or body.get("max_tokens")
        self._count = min(bound if isinstance(bound, int) else 8, MAX_TOKENS_SERVED)
        self._sent = 0
        self._given: list[int] = []  # ids of the answer that came with the prompt
        self._tokens = Tokens(self._seed, self._given)
        self._go_on()
        pace = body.get("fake_chunk_s")
        self._chunk_s = pace if isinstance(pace, float) else self.behaviour.chunk_s
        params = body.get("kv_transfer_params")
        self._params: Json = params if isinstance(params, dict) else {}
        disagg = self._params.get("disagg")
        self._disagg: Json = disagg if isinstance(disagg, dict) else {}
        self.course = Course(
            engine,
            self,
            self._params,
            prompt=prompt,
            prompt_tokens=self._prompt_tokens,
            tokens=self._count,
            stream=bool(body.get("stream")),
        )

    def _go_on(self) -> None:
        """Read a prompt that holds the ids of another one and of its answer so far."""
        params = self._body.get("kv_transfer_params")
        ids = params.get("prompt_token_ids") if isinstance(params, dict) else None
        if not self._chat:
            ids = self._body.get("prompt")
        read = read_ids(ids)
        if read is not None and isinstance(ids, list):
            self._seed, self._given = read
            self._prompt_tokens = len(ids) + self.behaviour.more_read
            if self.behaviour.tokens:
                self._count = self.behaviour.tokens - len(self._given)

    def begin(self) -> None:
        engine, how = self._engine, self.behaviour
        prefill, decode = self.course.prefill, self.course.decode
        if self.course.kv is not None:
            self._seed = self.course.kv  # the KV of another prompt would answer that one
        self._tokens = Tokens(self._seed, self._given, odd_chars=how.odd_chars)
        engine.seen.prefills += prefill
        engine.seen.decodes += decode
        engine.seen.locals += not prefill and not decode
        if how.status is not None:
            self._to.error(how.status, f"made to answer {how.status}")
        elif how.hang == "head":
            return
        elif how.close == "head":
            self._to.transport.abort()
        elif how.garbage == "http":
            self._to.transport.write(b"\x00\x01 this is not HTTP\r\n\r\n")
        elif how.garbage == "body":
            self._to.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: 9\r\n\r\n<garbage>"
            )
        elif prefill:
            engine.report("prefill", self._disagg.get("ticket"), self._prompt_tokens)
            self._to.whole(self._whole(self._prefill_params()), framed=not how.close_delimited)
        else:
            if decode:
                engine.report("decode", self._disagg.get("ticket"), self._prompt_tokens)
            self._answer()

    def _answer(self) -> None:
        if not self._body.get("stream"):
            if self.behaviour.close == "stream":
                self._to.transport.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                    b"content-length: 1000\r\n\r\n{"
                )
                self._to.transport.close()
                return
            self._to.whole(self._whole(None), framed=not self.behaviour.close_delimited)
            return
        framing = b"" if self.behaviour.close_delimited else b"transfer-encoding: chunked\r\n"
        self._to.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n%b\r\n" % framing
        )
        if (code := self.behaviour.error_event) is not None:
            self._fail("the KV did not come", code)
            return
        self._chunk()

    def go_on(self) -> None:
        """More tokens are there."""
        self._chunk()

    def _chunk(self) -> None:
        how = self.behaviour
        while True:
            if self._sent >= how.after_chunks and self._fails_inside():
                return
            if self._sent >= self._count:
                self._end()
                return
            ready = self.course.ready
            if self._sent >= ready:
                return
            pieces, upto = [], ready if self._engine.pacer is not None else self._sent + 1
            for at in range(self._sent, upto):
                last = at == self._count - 1
                pieces.append(self._event(at, "length" if last else None))
            self._write(b"".join(pieces))
            self._sent = upto
            if self._chunk_s > 0:
                self._to.later(self._chunk_s, self._chunk)
                return

    def _fail(self, message: str, code: int) -> None:
        error = {"error": {"message": message, "code": code}}
        self._write(b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(error))
        self._to.done()
        self._to.transport.write(b"0\r\n\r\n")

    def _fails_inside(self) -> bool:
        how = self.behaviour
        if how.error_inside is not None:
            self._fail("the engine died", how.error_inside)
            return True
        if how.close == "event":
            event = self._event(self._sent, None)
            self._write(event[: len(event) // 2])
        if how.close in ("stream", "event"):
            self._to.transport.close()
        return how.close in ("stream", "event") or how.hang == "stream"

    def _end(self) -> None:
        if self.behaviour.hang_after == "finish":
            return
        options = self._body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            event = {"id": "x", "choices": [], "usage": self._usage()}
            self._write(b"data: %b\n\n" % msgspec.json.encode(event))
        if not self.behaviour.no_done:
            self._write(b"data: [DONE]\n\n")
        if self.behaviour.hang_after == "DONE":
            return
        self._to.done()
        if self.behaviour.close_delimited:
            self._to.transport.close()
        else:
            self._to.transport.write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if not self.behaviour.close_delimited:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._to.transport.write(data)

    def _event(self, index: int, finish: str | None) -> bytes:
        text = self._tokens.text(index)
        key, value = ("delta", {"content": text}) if self._chat else ("text", text)
        choice: Json = {"index": 0, key: value, "finish_reason": finish}
        if self._body.get("return_token_ids"):
            choice["token_ids"] = [self._tokens.id(index)]
            if index == 0:
                choice["prompt_token_ids"] = prompt_ids(self._seed, self._prompt_tokens)
        event = {"id": "x", "object": "chunk", "model": self._engine.model, "choices": [choice]}
        return b"data: %b\n\n" % msgspec.json.encode(event)

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._count,
            "total_tokens": self._prompt_tokens + self._count,
        }

    def _whole(self, params: Json | None) -> Json:
        text = "".join(self._tokens.text(i) for i in range(self._count))
        choice: Json = {"index": 0, "finish_reason": "length"}
        choice.update(
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        )
        answer: Json = {"id": "x", "model": self._engine.model, "choices": [choice]}
        answer["usage"] = self._usage()
        if params is not None:
            answer["kv_transfer_params"] = params
        return answer

    def _prefill_params(self) -> Json | None:
        if self.behaviour.no_params:
            return None
        kept = self.course.publish(self._seed)
        if not self._disagg:
            nixl: Json = {"do_remote_prefill": True, "do_remote_decode": False}
            where = {"remote_host": "127.0.0.1", "remote_port": 1, **kept}
            return {**nixl, **where, "remote_engine_id": "e", "remote_block_ids": [1]}
        here = {"host_id": "h", "addresses": {"shm": "a"}}
        endpoint = {"tp_rank": 0, "tp_size": 1, **here, **kept}
        record = {"version": 1, "num_tokens": self._prompt_tokens, "endpoints": [endpoint]}
        return {"disagg": record, "remote_prefill_cached_tokens": 0}


if __name__ == "__main__":
    from disagg_plugins.testing.fake_process import run

    run()
