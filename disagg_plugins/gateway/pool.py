"""The open connections to one worker.

The last connection that became free is taken first, so that the others grow old and are closed.
Nothing waits here: a call gets a free connection, or one is opened for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.gateway.upstream import Call, UpstreamConnection

if TYPE_CHECKING:
    from disagg_plugins.types import Worker

MAX_IDLE_S = 30.0
"""Free connections are closed after this; most servers close them after 5 s."""

Spawn = Callable[[Coroutine[object, object, None]], object]


class WorkerPool:
    """Connections to one worker.

    Args:
        worker: The worker.
        spawn: Runs a coroutine in the gateway's task group.
        connect_s: Bound on opening a connection.
    """

    def __init__(self, worker: Worker, spawn: Spawn, *, connect_s: float) -> None:
        self.worker = worker
        parts = urlsplit(worker.url)
        self.host_header = parts.netloc.encode("ascii")
        self._address = (parts.hostname or "", parts.port or 80)
        self._spawn = spawn
        self._connect_s = connect_s
        self._idle: list[UpstreamConnection] = []
        self._busy: set[UpstreamConnection] = set()
        self._connecting = 0
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<WorkerPool {self.worker.name}: {len(self._busy)} busy, {len(self._idle)} idle, "
            f"{self._connecting} connecting>"
        )

    def counts(self) -> dict[str, int]:
        """Return how many connections are in which state."""
        return {
            "busy": len(self._busy),
            "idle": len(self._idle),
            "connecting": self._connecting,
        }

    @property
    def closed(self) -> bool:
        """Whether it carries no more calls."""
        return self._closed

    def submit(self, call: Call) -> None:
        """Send a call on a free connection, or on a new one."""
        if self._closed:
            # Not at once: whoever submits is in the middle of something.
            text = f"worker {self.worker.name} has left the fleet"
            asyncio.get_running_loop().call_soon(self._report, call, "gone", text)
            return
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and not connection.transport.is_closing():
                self._busy.add(connection)
                connection.start(call)
                return
        self.submit_fresh(call)

    def submit_fresh(self, call: Call) -> None:
        """Send a call on a new connection."""
        self._connecting += 1
        self._spawn(self._connect(call))

    def release(self, connection: UpstreamConnection) -> None:
        """Take back a connection that may carry another call."""
        self._busy.discard(connection)
        full = self._closed or len(self._idle) >= self.worker.capacity
        if full or connection.transport.is_closing():
            connection.drop()
            return
        connection.idle_since_s = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def gone(self, connection: UpstreamConnection) -> None:
        """Forget a closed connection; idempotent."""
        self._busy.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def sweep(self) -> None:
        """Close connections that have been free for long."""
        oldest_s = asyncio.get_running_loop().time() - MAX_IDLE_S
        while self._idle and self._idle[0].idle_since_s < oldest_s:
            self._idle[0].drop()

    def close(self) -> None:
        """Close every connection, busy ones and those that are being opened too."""
        self._closed = True
        for connection in [*self._idle, *self._busy]:
            connection.drop()

    def end(self, kind: str, detail: str) -> None:
        """Close, and tell every call that is still on its way why it failed."""
        self._closed = True
        for connection in [*self._idle, *self._busy]:
            connection.fail(kind, detail)

    async def _connect(self, call: Call) -> None:
        kind, detail = "", ""
        connection: UpstreamConnection | None = None
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: UpstreamConnection(self), *self._address
                )
        except TimeoutError:
            kind = "unreachable"
            detail = f"no connection within {self._connect_s:g} s (policy key gateway.connect_s)"
        except ConnectionRefusedError:
            kind, detail = "refused", "nobody listens"
        except (OSError, UnicodeError) as exc:  # a name that is none makes the latter
            kind, detail = "unreachable", str(exc)
        finally:
            self._connecting -= 1
        if connection is None:
            self._report(call, kind, f"{detail} at {self.worker.url}")
            return
        _no_delay(connection.transport)
        self._busy.add(connection)
        if call.ended:
            self.release(connection)
        elif self._closed:
            connection.drop()
            self._report(call, "gone", f"worker {self.worker.name} has left the fleet")
        else:
            connection.start(call)

    def _report(self, call: Call, kind: str, detail: str) -> None:
        if not call.ended:
            call.ended = True
            call.listener.call_failed(call, kind, detail)


def _no_delay(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
