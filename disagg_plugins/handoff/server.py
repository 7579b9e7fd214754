"""The publisher's side of a socket transport: accepting, bounding and closing connections.

One thread accepts, one thread serves each connection (``connection.py``). Strangers are cheap:
before authentication a connection may hold its thread for ``connect_s`` only, and when all
``max_connections`` are taken the oldest stranger makes room.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from typing import TYPE_CHECKING

from disagg_plugins.handoff.connection import Connection, Delivery

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Identity
    from disagg_plugins.handoff.publications import PublicationStore
    from disagg_plugins.policy import HandoffPolicy

logger = logging.getLogger(__name__)

JOIN_S = 5.0
"""Bound on waiting for one thread at close; its socket is shut by then, so it is on its way."""

ACCEPT_PAUSE_S = 0.2
"""Pause after a failed accept (out of descriptors), so that it does not spin."""


class SocketListener:
    """Serves one store on one listening socket.

    Args:
        sock: Bound and listening; owned from here on.
        address: Told to peers.
        store: What is served.
        identity: Told to peers after authentication.
        secret: The fleet's shared secret.
        policy: Time-outs and the bound on connections.
        delivery: How rows travel; owned from here on.
        transport: Named in errors and thread names.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        address: str,
        store: PublicationStore,
        identity: Identity,
        secret: bytes,
        policy: HandoffPolicy,
        delivery: Delivery,
        transport: str,
    ) -> None:
        self._sock = sock
        self._address = address
        self._store = store
        self._identity = identity
        self._secret = secret
        self._policy = policy
        self._delivery = delivery
        self._transport = transport
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._closed = threading.Event()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._acceptor = threading.Thread(
            target=self._accept_loop, name=f"disagg-{transport}-accept", daemon=True
        )
        self._sock.setblocking(False)
        self._acceptor.start()

    @property
    def address(self) -> str:
        """Where peers connect."""
        return self._address

    @property
    def num_connections(self) -> int:
        """Connections being served now."""
        with self._lock:
            return len(self._connections)

    def close(self) -> None:
        """Stop accepting, end open connections, join the threads; idempotent, bounded."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")
        self._acceptor.join(JOIN_S)
        self._sock.close()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.shut()
        for thread in connections.values():
            thread.join(JOIN_S)
        self._delivery.close()
        self._wake_receive.close()
        self._wake_send.close()

    def _accept_loop(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_receive, select.POLLIN)
        while not self._closed.is_set():
            poll.poll()
            if self._closed.is_set():
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError:
                logger.exception("%s listener cannot accept", self._transport)
                self._closed.wait(ACCEPT_PAUSE_S)
                continue
            try:
                self._start(sock)
            except Exception:
                logger.exception("%s listener cannot serve a connection", self._transport)
                sock.close()

    def _start(self, sock: socket.socket) -> None:
        connection = Connection(
            sock,
            store=self._store,
            identity=self._identity,
            secret=self._secret,
            policy=self._policy,
            delivery=self._delivery,
            transport=self._transport,
        )
        with self._lock:
            # A stranger that was shut counts until its thread has ended, which takes a moment:
            # up to twice the bound may be open for that long, never more.
            bound = self._policy.max_connections
            full = len(self._connections) >= bound
            strangers = [c for c in self._connections if not c.authenticated and not c.shut_already]
            if full and (not strangers or len(self._connections) >= 2 * bound):
                logger.warning(
                    "%s listener refuses a connection: all %d are taken (handoff.max_connections)",
                    self._transport,
                    bound,
                )
                connection.close()
                return
            if full:
                strangers[0].shut()
            thread = threading.Thread(
                target=self._serve,
                args=(connection,),
                name=f"disagg-{self._transport}-peer",
                daemon=True,
            )
            self._connections[connection] = thread
        try:
            thread.start()
        except BaseException:
            with self._lock:
                del self._connections[connection]
            raise

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            connection.close()
            with self._lock:
                self._connections.pop(connection, None)
