"""A client that takes whatever comes, on connections of its own or kept ones."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

import httptools

from tests.chaos.judge import Reply
from tests.chaos.proxy import reset

if TYPE_CHECKING:
    from tests.chaos.plan import Ask

CONNECT_S = 5.0
NOT_SENT = "no connection"
"""How a reply's problem begins when nothing was sent."""


class Connection(asyncio.Protocol):
    """One connection to a gateway."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.closed = False
        self.reply = Reply()
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None
        self._reads_left: int | None = None
        self._keep = False

    @property
    def free(self) -> bool:
        """Whether it can carry another request."""
        return self.open and self._keep and self.reply.complete

    @property
    def open(self) -> bool:
        """Whether bytes can be sent: a peer's end shows on the transport first."""
        return not self.closed and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.reply.surplus = True
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._end(f"not HTTP: {exc}")
            self.transport.abort()
        if self._reads_left is not None:
            self._reads_left -= 1
            self._abort_if_due()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._end(f"the gateway closed the connection ({exc or 'orderly'})")

    def on_message_begin(self) -> None:
        """A status line begins."""
        if self.reply.complete:
            self.reply.surplus = True

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self.reply.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self.reply.body += body

    def on_message_complete(self) -> None:
        """That is all."""
        self._keep = self._parser.should_keep_alive()
        if self._parser.get_http_version() == "1.1" and not self.closed:
            self.reply.complete = True
            self._end("")

    def _end(self, problem: str) -> None:
        if self._done is not None and not self._done.done():
            self.reply.problem = problem
            self._done.set_result(None)

    def _abort_if_due(self) -> None:
        if self._reads_left is not None and self._reads_left < 0 and not self.reply.complete:
            self.reply.aborted = True
            self._end("the client reset")
            reset(self.transport)

    async def ask(self, ask: Ask, bound_s: float) -> Reply:
        """Send a request and wait for its answer, at most ``bound_s``."""
        self.reply, self._keep = Reply(), False
        self._done = asyncio.get_running_loop().create_future()
        self._reads_left = ask.abort_after
        begin_s = time.monotonic()
        self.transport.write(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (ask.path.encode(), ask.name.encode(), len(ask.body), ask.body)
        )
        if ask.abort_after == 0:
            asyncio.get_running_loop().call_later(0.01, self._soon)
        try:
            async with asyncio.timeout(bound_s):
                await self._done
        except TimeoutError:
            self._end(f"not over within {bound_s:g} s")
            self.transport.abort()
        self.reply.seconds = time.monotonic() - begin_s
        return self.reply

    def _soon(self) -> None:
        if self._done is not None and not self._done.done():
            self._reads_left = -1
            self._abort_if_due()


class Client:
    """Sends requests to one gateway.

    Attributes:
        kept: Connections that wait for another request.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.kept: list[Connection] = []

    async def ask(self, ask: Ask, bound_s: float) -> Reply:
        """Send a request; what becomes of it is in the reply."""
        self.kept = [c for c in self.kept if c.open]
        while ask.kept and self.kept:
            connection = self.kept.pop()
            if not connection.open:
                continue
            reply = await connection.ask(ask, bound_s)
            if reply.status or reply.aborted or reply.complete:
                break
            # closed while it was kept, before a byte: HTTP lets a client send again
            if "closed" not in reply.problem or reply.seconds > 1:
                return reply
        else:
            opened = await self._connect()
            if isinstance(opened, Reply):
                return opened
            connection = opened
            reply = await connection.ask(ask, bound_s)
        if connection.free:
            self.kept.append(connection)
        else:
            connection.transport.close()
        return reply

    async def _connect(self) -> Connection | Reply:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        except (OSError, TimeoutError) as exc:
            return Reply(problem=f"{NOT_SENT}: {exc!r}")
        return connection

    def close(self) -> None:
        """Close what is kept."""
        for connection in self.kept:
            connection.transport.close()
        self.kept.clear()
