"""One client connection: reads requests, frames answers, notices that the client went away.

One request is answered at a time; bytes of a next one that come early wait within a bound. While
an answer is being made the socket stays open for reading, because that is how a client's leaving
is seen.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from disagg_plugins.gateway.refusals import error_body
from disagg_plugins.gateway.reply import Reply
from disagg_plugins.gateway.sending import Sender
from disagg_plugins.gateway.wire import Header, answer_head, header_value

if TYPE_CHECKING:
    from disagg_plugins.gateway.body import Body
    from disagg_plugins.gateway.reply import Answering, Client
    from disagg_plugins.policy import Policy
    from disagg_plugins.telemetry.metrics import Metrics

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
MAX_EARLY_BYTES = 64 * 1024
"""Bytes of later requests that wait while one is answered; then the connection closes after it."""

MAX_EARLY_REQUESTS = 16
WRITE_HIGH_BYTES = 64 * 1024
"""Unsent bytes at which reading from the worker stops."""

LINGER_S = 2.0
"""How long a refused client may go on sending into the void before it is cut off."""

FOREVER = float("inf")
JSON = b"content-type: application/json\r\n"


@dataclass(slots=True)
class Request:
    """One request of a client.

    Attributes:
        name: Its id, where somebody has given it one already.
        arm: Which arm of a canary answers it, and why: ``str`` of it says so in words; empty
            without a canary.
        read: Its body, where somebody has read it already.
    """

    method: bytes
    path: bytes
    headers: list[Header]
    body: bytes
    keep_alive: bool
    http10: bool
    name: str = ""
    arm: object = ""
    read: Body | None = None


class Center(Protocol):
    """What answers the requests of connections."""

    @property
    def policy(self) -> Policy:
        """Its bounds on connections."""
        ...

    @property
    def metrics(self) -> Metrics:
        """Where refusals are counted."""
        ...

    @property
    def connections(self) -> set[ClientConnection]:
        """All that are open; each enters itself."""
        ...

    @property
    def draining(self) -> bool:
        """Whether a connection ends with its answer."""
        ...

    def handle(self, request: Request, client: ClientConnection) -> None:
        """Answer one request."""
        ...

    def left(self, client: ClientConnection) -> None:
        """A connection is closed; it leaves the open ones."""
        ...


class ClientConnection(asyncio.Protocol):
    """One connection of a client."""

    transport: asyncio.Transport

    def __init__(self, gateway: Center) -> None:
        self._gateway = gateway
        self._parser = httptools.HttpRequestParser(self)
        self._requests: deque[Request] = deque()
        self._request: Request | None = None
        self._answering: Answering | None = None
        self._reply: Reply | None = None
        self._early = b""
        self._refusal: tuple[int, str] | None = None
        self._last = False
        self.chunked = False
        self._started = False
        self._receiving = False
        self._declined: Request | None = None
        self._declined_bytes = 0
        self.deadline_s = FOREVER
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._head_done = False
        self._body: list[bytes] = []
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        # after a peer that went, a write may tell before reading does
        self._sender = Sender(self.transport, self.transport.abort)
        self._send = self._sender.send
        self.deadline_s = time.monotonic() + self._gateway.policy.gateway.client_idle_s
        self._gateway.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._last = True
        self._request = None
        answering = self._answering
        self._revoke()
        try:
            if answering is not None:
                answering.client_gone()
        finally:
            self._gateway.left(self)

    def _revoke(self) -> None:
        self._answering = None
        self._started = False
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.revoke()

    def lend(self) -> Sender:
        """Return a sender for one answer, to be revoked at its end."""
        return self._sender.lend()

    def pause_writing(self) -> None:
        if self._answering is not None:
            self._answering.client_slow(True)

    def resume_writing(self) -> None:
        if self._answering is not None:
            self._answering.client_slow(False)

    def data_received(self, data: bytes) -> None:
        if self._request is not None or self._early:
            # Never stop reading: that is how a client's leaving is seen.
            if not self._last:
                self._early += data
                if len(self._early) > MAX_EARLY_BYTES:
                    self._last, self._early = True, b""
            return
        if not self._last:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        if not self._receiving:
            self._receiving = True
            self.deadline_s = time.monotonic() + self._gateway.policy.gateway.client_idle_s
        if not self._head_done:
            self._head_bytes += len(data)
        if self._declined is not None:
            self._feed_declined(self._declined, data)
        else:
            self._parse(data)
        if not self._head_done and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head exceeds {MAX_HEAD_BYTES} bytes")
        self._next()

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            if self._declined is not None:
                self._feed_declined(self._declined, data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._refuse(400, f"this is not a valid HTTP/1.1 request: {exc}")

    def _feed_declined(self, request: Request, data: bytes) -> None:
        """Read the body of a request that offered another protocol.

        The offer is declined by answering. The parser leaves such a body alone, though common
        clients (Java's) send one; its length is known, and nothing is read beyond it.
        """
        left = self._declined_bytes - len(request.body)
        request.body += data[:left]
        if len(request.body) == self._declined_bytes:
            self._declined = None
            self._last = True
            self._requests.append(request)

    def _feed_early(self) -> None:
        early, self._early = self._early, b""
        if early and not self._last:
            self._feed(early)

    def _refuse(self, status: int, message: str) -> None:
        if self._refusal is None:
            self._refusal = (status, message)

    def _next(self) -> None:
        """Begin the next answer if none is being made."""
        if self._request is not None or self.transport.is_closing():
            return
        if self._requests:
            self._request = request = self._requests.popleft()
            self._receiving = False
            self.deadline_s = FOREVER
            self._gateway.handle(request, self)
        elif self._refusal is not None:
            status, message = self._refusal
            self._last = True
            self._gateway.metrics.count("disagg_client_errors", (str(status),))
            self._request = Request(b"GET", b"", [], b"", False, False)
            self.answer(status, error_body(status, message))

    # httptools; these must not raise

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reset()

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        if len(self._url) <= MAX_HEAD_BYTES:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header line."""
        self._head_bytes += len(name) + len(value)
        if len(self._headers) >= MAX_HEADERS or self._head_bytes > 2 * MAX_HEAD_BYTES:
            self._refuse(431, f"more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes of them")
            return
        if not self._head_done:  # trailers are dropped: nobody may add headers after the check
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is complete: check what can be checked before the body."""
        self._head_done = True
        expects = False
        length = 0
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value) if value.isdigit() and len(value) < 19 else 1 << 62
            elif name == b"expect":
                expects = value.lower() == b"100-continue"
        if length > self._gateway.policy.gateway.max_body_bytes:
            self._too_large()
        elif expects and self._refusal is None and self._request is None:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _too_large(self) -> None:
        bound = self._gateway.policy.gateway.max_body_bytes
        self._refuse(413, f"the body exceeds {bound} bytes (policy key gateway.max_body_bytes)")

    def on_body(self, body: bytes) -> None:
        """Part of the body, without framing."""
        self._body_bytes += len(body)
        if self._body_bytes > self._gateway.policy.gateway.max_body_bytes:
            self._body.clear()
            self._too_large()
        elif self._refusal is None:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        if self._refusal is not None:
            return
        if len(self._requests) >= MAX_EARLY_REQUESTS:
            self._refuse(400, f"more than {MAX_EARLY_REQUESTS} requests sent ahead")
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        http10 = self._parser.get_http_version() == "1.0"
        keep_alive = self._parser.should_keep_alive()
        method = self._parser.get_method()
        request = Request(method, self._url, self._headers, body, keep_alive, http10)
        if self._parser.should_upgrade():
            self._decline(request)
        else:
            self._requests.append(request)
        self._reset()

    def _decline(self, request: Request) -> None:
        length = header_value(request.headers, b"content-length") or b"0"
        chunked = header_value(request.headers, b"transfer-encoding") is not None
        if request.method == b"CONNECT" or chunked or not length.isdigit():
            self._refuse(400, "a request that offers another protocol must have a plain body")
            return
        self._declined, self._declined_bytes = request, int(length)

    # Answers

    def answering(self, by: Answering, through: Client | None = None) -> Reply:
        """Name who answers, and is told when the client goes or is slow.

        Args:
            by: Who answers.
            through: What its answer passes on the way here; None: nothing.
        """
        self._answering = by
        self._reply = Reply(through or self)
        return self._reply

    @property
    def request(self) -> Request | None:
        """The request that is being answered, or None."""
        return self._request

    @property
    def started(self) -> bool:
        """Whether an answer of unknown length has begun."""
        return self._started

    def release(self) -> None:
        """Take the right to answer from who has it; nothing was sent, and another will answer."""
        self._revoke()

    def abort(self) -> None:
        """Close at once, unsent bytes and all."""
        self.transport.abort()

    def answer(self, status: int, body: bytes, lines: bytes = JSON) -> None:
        """Send a whole answer."""
        request = self._request
        if request is None:
            return
        if self._started:
            self.break_off(b"")
            return
        close = self._closes(request)
        head = answer_head(status, lines, length_bytes=len(body), chunked=False, close=close)
        self._send(head if request.method == b"HEAD" else head + body)
        self._answered()

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """Send the head of an answer of unknown length and its first bytes."""
        request = self._request
        if request is None or self._started:
            return
        self._started = True
        self.chunked = not request.http10
        close = self._closes(request) or request.http10
        self._last = close
        head = answer_head(status, lines, length_bytes=None, chunked=self.chunked, close=close)
        self._send(head + self._framed(first))

    def write(self, data: bytes) -> None:
        """Send more of an answer that was started; nothing is sent of nothing."""
        if data:
            self._send(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        if not self.chunked or not data:  # a chunk without bytes would end the answer
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)

    @property
    def lost_bytes(self) -> bool:
        """Whether bytes of the answer could not be handed to the kernel."""
        return self._sender.failed

    def complete(self, last: bytes = b"") -> None:
        """End an answer that was started; ``last`` goes out with the end in one write."""
        end = self._framed(last) + (b"0\r\n\r\n" if self.chunked else b"")
        if end:
            self._send(end)
        self._answered()

    def break_off(self, last: bytes) -> None:
        """End an answer that was started so that it cannot be taken for complete."""
        if self._request is None:
            return
        if last:
            self.write(last)
        self._revoke()
        self._request = None
        self._last = True
        if self.chunked:
            self.transport.close()  # the end chunk is missing: clients see a broken answer
        else:
            self.transport.abort()

    def _closes(self, request: Request) -> bool:
        if not request.keep_alive or self._gateway.draining:
            self._last = True
        return self._last

    def _answered(self) -> None:
        self._revoke()
        self._request = None
        if self._last:
            self._leave()
            return
        self.deadline_s = time.monotonic() + self._gateway.policy.gateway.client_idle_s
        if self._requests or self._refusal is not None:
            asyncio.get_running_loop().call_soon(self._next)
        elif self._early:
            asyncio.get_running_loop().call_soon(self._feed_early)

    def _leave(self) -> None:
        """Close; after a refusal, only once the client had time to read why.

        Closing with unread bytes in the socket makes the kernel reset the connection, which can
        destroy the answer on its way.
        """
        if self._refusal is None or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.deadline_s = time.monotonic() + LINGER_S

    def expire(self) -> None:
        """The deadline passed: an unfinished request is refused, an idle connection closed."""
        if self._request is not None:
            return
        if self._receiving and not self._last:
            idle_s = self._gateway.policy.gateway.client_idle_s
            self._refuse(408, f"the request was not complete within {idle_s:g} s")
            self._requests.clear()
            self._next()
        else:
            self.transport.abort()

    def addresses(self) -> tuple[str | None, str | None]:
        """Return the client's address and this host's, without ports."""
        peer = self.transport.get_extra_info("peername")
        here = self.transport.get_extra_info("sockname")
        return (peer[0] if peer else None, here[0] if here else None)

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return self._request is not None

    def close(self) -> None:
        """Close: at once when idle, after the answer otherwise."""
        self._last = True
        if self._request is None:
            self.transport.close()
