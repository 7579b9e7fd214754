"""One keep-alive connection to a worker, and the calls that travel on it.

A call reports to its listener: head, data, end, or one failure. A listener hears nothing more of
a call that it cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from disagg_plugins.gateway.sending import Sender

if TYPE_CHECKING:
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.wire import Header

MAX_HEAD_BYTES = 256 * 1024
"""Longest head of an answer; servers in use stay below 2 KiB."""


class CallListener(Protocol):
    """Who made a call."""

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """The head of the answer came."""
        ...

    def call_data(self, call: Call, data: bytes) -> None:
        """Bytes of the answer's body came."""
        ...

    def call_end(self, call: Call) -> None:
        """The answer is complete."""
        ...

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        """There will be no complete answer."""
        ...


class Call:
    """One request to a worker.

    Attributes:
        side: ``prefill``, ``decode`` or ``probe``.
        payload: The whole HTTP request.
        ended: Complete, failed or cancelled.
        retried: Sent again because a kept connection had died.
        last: The answer is complete with the bytes at hand; ``call_end`` follows.
        told: What the worker's adapter said when it was asked about the answer.
    """

    __slots__ = ("connection", "ended", "last", "listener", "payload", "retried", "side", "told")

    def __init__(self, side: str, payload: bytes, listener: CallListener) -> None:
        self.side = side
        self.payload = payload
        self.listener = listener
        self.connection: UpstreamConnection | None = None
        self.ended = False
        self.last = False
        self.retried = False
        self.told = b""

    def cancel(self) -> None:
        """End the call; its connection is closed so that the worker sees it."""
        self.ended = True
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.drop()

    def pause(self) -> None:
        """Stop reading the answer."""
        if self.connection is not None:
            self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Go on reading the answer."""
        if self.connection is not None:
            self.connection.transport.resume_reading()

    def pass_chunks(self, take: Callable[[bytes], bool]) -> None:
        """Show reads that begin where a chunk may begin to ``take``, framing and all.

        It takes those that are exactly one chunk of whole events, and returns False for all
        others, which still come as ``call_data``. A stream of tokens is made of such reads, and
        neither parsing nor framing them again saves a third of a chunk's cost.
        """
        if self.connection is not None:
            self.connection.chunk_taker = take


class UpstreamConnection(asyncio.Protocol):
    """One connection; carries one call at a time."""

    transport: asyncio.Transport

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self.used = False
        self.closed = False
        self.idle_since_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[Header] = []
        self._pieces: list[bytes] = []
        self._status = 0
        self._received_bytes = 0
        self._head_ready = False
        self._head_told = False
        self._complete = False
        self._framed = False
        self._surplus = False
        self._keep_alive = False
        self._chunk_open = False
        self.chunk_taker: Callable[[bytes], bool] | None = None
        self._fast: Callable[[bytes], bool] | None = None

    def start(self, call: Call) -> None:
        """Send a call; the connection is free and open."""
        self._call = call
        call.connection = self
        self._reset()
        self._sender.send(call.payload)

    def drop(self) -> None:
        """Close without a word to the listener."""
        self._call = None
        self._fast = self.chunk_taker = None
        self.closed = True
        self._pool.gone(self)
        self.transport.abort()

    def fail(self, kind: str, detail: str) -> None:
        """Close; the call that it carries, if any, failed."""
        self._fail(kind, detail)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._sender = Sender(self.transport)

    def data_received(self, data: bytes) -> None:
        # The parser stands before a chunk. If these bytes are exactly one, it need not see them:
        # afterwards it stands before a chunk again.
        fast = self._fast
        if fast is None or not fast(data):
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        call = self._call
        if call is None:
            self.drop()
            return
        self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail("garbage", f"its answer is not HTTP: {exc}")
            return
        if self._surplus:
            self._fail("garbage", "it sent more than one answer")
            return
        if self._head_ready:
            if not self._head_told:
                self._head_told = True
                call.listener.call_head(call, self._status, self._headers)
            if self._pieces and self._call is call:
                pieces = self._pieces
                body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                pieces.clear()
                call.last = self._complete
                call.listener.call_data(call, body)
            if self._complete and self._call is call:
                self._end(call)
            elif self.chunk_taker is not None:
                between = not self._chunk_open and data.endswith(b"\r\n")
                self._fast = self.chunk_taker if between else None
        elif self._received_bytes > MAX_HEAD_BYTES:
            self._fail("garbage", f"the head of its answer exceeds {MAX_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._pool.gone(self)
        call, self._call = self._call, None
        if call is None or call.ended:
            return
        call.connection = None
        if self._head_told and not self._framed and exc is None:
            call.ended = True
            call.listener.call_end(call)
            return
        if self.used and not call.retried and self._received_bytes == 0:
            call.retried = True
            self._pool.submit_fresh(call)
            return
        call.ended = True
        when = "during its answer" if self._head_told else "before it answered"
        call.listener.call_failed(call, "closed", f"the worker closed the connection {when}")

    # httptools

    def on_message_begin(self) -> None:
        """A status line begins."""
        if self._complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line; those of a trailer are dropped."""
        if self._head_ready:
            return
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self._framed = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._status = self._parser.get_status_code()
        self._head_ready = self._status >= 200

    def on_chunk_header(self) -> None:
        """The line with a chunk's size is complete."""
        self._chunk_open = True

    def on_chunk_complete(self) -> None:
        """A chunk and the line end after it are complete."""
        self._chunk_open = False

    def on_body(self, body: bytes) -> None:
        """Part of the body, without framing."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """The message is complete; an interim (1xx) one is forgotten."""
        if self._head_ready:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()  # true only while in here
        else:
            self._headers = []
            self._framed = False

    def _end(self, call: Call) -> None:
        self._call = None
        self._fast = self.chunk_taker = None
        call.connection = None
        call.ended = True
        if self._keep_alive:
            self.used = True
            self._pool.release(self)
        else:
            self.drop()
        call.listener.call_end(call)

    def _fail(self, kind: str, detail: str) -> None:
        call = self._call
        self.drop()
        if call is not None:
            call.connection = None
            call.ended = True
            call.listener.call_failed(call, kind, f"{detail} ({self._pool.worker.url})")
