"""A TCP proxy on loopback that holds bytes up, cuts answers and resets connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from typing import cast

RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER`` with no time: closing sends RST."""


def reset(transport: asyncio.Transport) -> None:
    """Close a connection so that its peer sees RST."""
    with contextlib.suppress(OSError):
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()


class Proxy:
    """Carries connections to ``target``.

    Attributes:
        delay_s: How long each piece of an answer is held up.
        cut_after: The next answer is reset after so many bytes; None: none is.
    """

    def __init__(self, port: int, target: int, tasks: asyncio.TaskGroup) -> None:
        self.port = port
        self.target = target
        self.tasks = tasks
        self.delay_s = 0.0
        self.cut_after: int | None = None
        self.near: set[_Near] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Near(self), "127.0.0.1", self.port)

    def reset_all(self) -> None:
        """Reset every connection that is open."""
        for near in list(self.near):
            near.cut()

    def calm(self) -> None:
        """Carry everything as it comes again."""
        self.delay_s, self.cut_after = 0.0, None

    def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        self.reset_all()


class _Near(asyncio.Protocol):
    """The side of the one who called."""

    transport: asyncio.Transport

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.far: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._held: deque[tuple[float, bytes | None]] = deque()  # None: close
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.proxy.near.add(self)
        self.proxy.tasks.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(5):
                far, _ = await loop.create_connection(
                    lambda: _Far(self), "127.0.0.1", self.proxy.target
                )
        except (OSError, TimeoutError):
            self.cut()
            return
        self.far = far
        if self._over:
            far.abort()
        for data in self._early:
            self.far.write(data)

    def data_received(self, data: bytes) -> None:
        if self.far is None:
            self._early.append(data)
        else:
            self.far.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self.proxy.near.discard(self)
        if self.far is not None:
            self.far.abort()

    def answer(self, data: bytes) -> None:
        """Bytes of the answer came."""
        proxy = self.proxy
        if proxy.cut_after is not None:
            proxy.cut_after -= len(data)
            if proxy.cut_after <= 0:
                proxy.cut_after = None
                self.cut()
                return
        self._hold(data)

    def ended(self) -> None:
        """The worker closed; what is held up goes out first."""
        self._hold(None)

    def _hold(self, data: bytes | None) -> None:
        at_s = asyncio.get_running_loop().time() + self.proxy.delay_s
        self._held.append((at_s, data))
        if len(self._held) == 1:
            self._release()

    def _release(self) -> None:
        """Write what is due, in order, whatever the delay was meanwhile."""
        loop = asyncio.get_running_loop()
        while self._held and not self._over:
            at_s, data = self._held[0]
            if at_s > loop.time():
                loop.call_at(at_s, self._release)
                return
            self._held.popleft()
            if data is None:
                self.transport.close()
            else:
                self.transport.write(data)

    def cut(self) -> None:
        """Reset both ends."""
        self._over = True
        reset(self.transport)
        if self.far is not None:
            reset(self.far)


class _Far(asyncio.Protocol):
    """The side of the worker."""

    def __init__(self, near: _Near) -> None:
        self._near = near

    def data_received(self, data: bytes) -> None:
        self._near.answer(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._near.ended()
