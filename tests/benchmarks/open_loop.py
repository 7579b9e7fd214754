"""An open-loop load generator: requests leave at their time, whatever became of earlier ones."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, cast

import httptools

from tests.benchmarks.goodput import Outcome

if TYPE_CHECKING:
    from tests.benchmarks.workloads import Ask

FAILURES_SHOWN = 3


class Stream(asyncio.Protocol):
    """One connection and the answer that it carries."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.closed = False
        self._done: asyncio.Future[None] | None = None
        self._renew()

    def _renew(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.first_s = self.last_s = 0.0
        self.tokens = 0
        self.status = 0
        self.complete = False
        self.ended = False
        self.said = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._finish()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A piece of the stream: one or more whole events."""
        if self.status != 200:
            self.said += body[:200]
            return
        count = body.count(b'"finish_reason"')
        if count:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.tokens += count
        self.ended = self.ended or b"[DONE]" in body

    def on_message_complete(self) -> None:
        """That is all."""
        self.complete = True
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, request: bytes) -> None:
        """Send and wait for the end; the caller bounds it."""
        self._renew()
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        await self._done


class Load:
    """Requests to one proxy.

    Args:
        port: The proxy's.
        speed: Virtual seconds a second.
        bound_s: No answer is waited for longer, in virtual seconds.
        model: The name that is asked for.
        exact: Each token is told for itself: fewer than asked for are a failure.

    Attributes:
        late_s: By how much each request left late, in virtual seconds: a probe of the machine.
    """

    def __init__(
        self,
        port: int,
        speed: float,
        bound_s: float,
        *,
        model: str = "fake-model",
        exact: bool = True,
    ) -> None:
        self.port = port
        self.exact = exact
        self.model = model
        self.speed = speed
        self.bound_s = bound_s
        self.late_s: list[float] = []
        self.failures: list[str] = []
        self._kept: list[Stream] = []

    async def run(self, asks: list[Ask]) -> list[Outcome]:
        """Send all; return what became of each, in order."""
        begin_s = time.monotonic() + 0.05
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(self._one(ask, begin_s)) for ask in asks]
        for stream in self._kept:
            stream.transport.close()
        self._kept.clear()
        return [task.result() for task in made]

    async def _one(self, ask: Ask, begin_s: float) -> Outcome:
        due_s = begin_s + ask.at_s / self.speed
        await asyncio.sleep(max(0.0, due_s - time.monotonic() - 0.02))
        request = encode(ask, self.model)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        sent_s = time.monotonic()  # a late generator makes a later arrival, not a slower answer
        self.late_s.append((sent_s - due_s) * self.speed)
        stream: Stream | None = None
        try:
            async with asyncio.timeout(self.bound_s / self.speed):
                stream = await self._stream()
                await stream.ask(request)
        except (OSError, TimeoutError) as exc:
            return self._failed(stream, repr(exc))
        enough = stream.tokens == ask.output_tokens if self.exact else stream.tokens > 0
        if stream.status != 200 or not enough or not stream.ended:
            why = f"{stream.status} {stream.said!r} {stream.tokens}/{ask.output_tokens} tokens"
            return self._failed(stream, why)
        if stream.complete and not stream.closed:
            self._kept.append(stream)
        ttft_s = (stream.first_s - sent_s) * self.speed
        if stream.tokens == 1:
            return Outcome(ttft_s)
        tpot_s = (stream.last_s - stream.first_s) / (stream.tokens - 1) * self.speed
        return Outcome(ttft_s, tpot_s)

    def _failed(self, stream: Stream | None, why: str) -> Outcome:
        if len(self.failures) < FAILURES_SHOWN:
            self.failures.append(why)
        if stream is not None and not stream.closed:
            stream.transport.abort()
        return Outcome(None)

    async def _stream(self) -> Stream:
        while self._kept:
            stream = self._kept.pop()
            if not stream.closed:
                return stream
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(Stream, "127.0.0.1", self.port)
        return stream


def encode(ask: Ask, model: str) -> bytes:
    """Return the HTTP request."""
    body = json.dumps(
        {
            "model": model,
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
        }
    ).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
