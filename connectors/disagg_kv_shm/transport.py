"""The ``shm`` transport: control over a Unix socket, bytes straight from the publisher's memory.

The publisher passes its sealed staging memfd once a connection, after both sides have proved the
secret. A READ is answered with places in that memory; the reader's sink copies from there, which
is the only copy on the reading side. Sockets are abstract: no file is left behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

from disagg_kv_shm.mapping import ArenaCache, PeerArena
from disagg_plugins.errors import ConfigError, RemoteProtocolError, TransportError
from disagg_plugins.handoff.client import SocketChannel
from disagg_plugins.handoff.frames import READY_ENTRY, FrameType, pack_frame
from disagg_plugins.handoff.server import SocketListener
from disagg_plugins.types import TransportCapabilities

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Channel, Identity, Listener
    from disagg_plugins.handoff.publications import Publication, PublicationStore
    from disagg_plugins.handoff.wire import Wire
    from disagg_plugins.policy import HandoffPolicy

logger = logging.getLogger(__name__)

BACKLOG = 128
LAYERS_PER_FRAME = 1024
"""READY entries in one frame: 20 KiB, below the bound on control frames."""

_ADDRESS = re.compile(r"@disagg-kv-[0-9a-f]{32}")
_UCRED = struct.Struct("3i")


def available() -> bool:
    """Return whether this kernel has memfd and abstract Unix sockets."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class ShmTransport:
    """Reads the staging memory of a publisher on the same host."""

    name = "shm"
    capabilities = TransportCapabilities(same_host=True, cross_host=False, one_sided=False)

    def __init__(self) -> None:
        self.arenas = ArenaCache()

    def listen(
        self, store: PublicationStore, identity: Identity, *, secret: bytes, policy: HandoffPolicy
    ) -> Listener:
        """Serve ``store`` on an abstract socket with a random name.

        Raises:
            ConfigError: This machine has no memfd.
        """
        if store.arena.fd is None:
            raise ConfigError(
                "transport shm needs memfd, which this platform lacks",
                key="handoff.transports",
                fix="leave shm out",
            )
        address = f"@disagg-kv-{secrets.token_hex(16)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        delivery = None
        try:
            sock.bind("\0" + address[1:])
            sock.listen(BACKLOG)
            delivery = ShmDelivery(store)
            return SocketListener(
                sock,
                address=address,
                store=store,
                identity=identity,
                secret=secret,
                policy=policy,
                delivery=delivery,
                transport=self.name,
            )
        except BaseException:
            sock.close()
            if delivery is not None:
                delivery.close()
            raise

    def connect(
        self, address: str, identity: Identity, *, secret: bytes, policy: HandoffPolicy
    ) -> Channel:
        """Open and authenticate a channel to ``address``.

        Raises:
            AuthenticationError: The peer does not hold the secret.
            IncompatiblePeerError: Protocol versions or fingerprints differ.
            TransportError: The address is malformed, nobody listens, or the time-out ended.
        """
        if not _ADDRESS.fullmatch(address):
            raise TransportError(self.name, f"{address[:64]!r} is not an address of this transport")
        started_s = time.monotonic()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(policy.connect_s)
            sock.connect("\0" + address[1:])
        except OSError as exc:
            sock.close()
            raise TransportError(self.name, f"cannot connect to {address}: {exc}") from exc
        return ShmChannel(
            sock,
            identity,
            arenas=self.arenas,
            secret=secret,
            policy=policy,
            transport=self.name,
            started_s=started_s,
        )


class ShmDelivery:
    """Tells peers where rows lie.

    Args:
        store: Whose arena is shared.
    """

    def __init__(self, store: PublicationStore) -> None:
        self._fd: int | None = store.arena.open_read_only()

    def welcome(self, wire: Wire, frame: bytes) -> None:
        """Send the WELCOME and a read-only descriptor of the arena."""
        if self._fd is None:
            raise TransportError("shm", "the listener is closed")
        with contextlib.suppress(OSError):
            credentials = wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid, uid, _ = _UCRED.unpack(credentials)
            logger.debug("process %d of user %d reads this rank's staging memory", pid, uid)
        wire.send_with_fd(frame, self._fd)

    def send_rows(
        self,
        wire: Wire,
        publication: Publication,
        *,
        layer: int,
        layers: int,
        first_block: int,
        num_bytes: int,
    ) -> None:
        """Send one READY entry for each layer."""
        entries = [
            READY_ENTRY.pack(each, publication.row_offset(each, first_block), num_bytes)
            for each in range(layer, layer + layers)
        ]
        for start in range(0, layers, LAYERS_PER_FRAME):
            piece = b"".join(entries[start : start + LAYERS_PER_FRAME])
            wire.send(pack_frame(FrameType.READY, piece))

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ShmChannel(SocketChannel):
    """A channel that reads rows in place.

    Args:
        sock: Connected; owned from here on.
        identity: Of this rank.
        arenas: Maps shared with other channels.
        secret: The fleet's shared secret.
        policy: Time-outs.
        transport: Named in errors.
        started_s: Monotonic time at which connecting began.
    """

    passes_memory = True

    def __init__(
        self,
        sock: socket.socket,
        identity: Identity,
        *,
        arenas: ArenaCache,
        secret: bytes,
        policy: HandoffPolicy,
        transport: str,
        started_s: float,
    ) -> None:
        self._arenas = arenas
        self._arena: PeerArena | None = None
        self._arena_key: tuple[int, int] | None = None
        self._release_lock = threading.Lock()
        super().__init__(
            sock, identity, secret=secret, policy=policy, transport=transport, started_s=started_s
        )

    def close(self) -> None:
        """Close the connection and give the map back; idempotent."""
        super().close()
        with self._release_lock:
            key, self._arena_key, self._arena = self._arena_key, None, None
        if key is not None:
            self._arenas.release(key)

    def _take_memory(self, fd: int | None) -> None:
        if fd is None:
            raise RemoteProtocolError("the peer sent no memory with its welcome")
        self._arena_key, self._arena = self._arenas.acquire(fd)

    def _shared_rows(self, offset: int, num_bytes: int) -> memoryview:
        if self._arena is None:
            raise RemoteProtocolError("the peer points into memory that it never shared")
        return self._arena.rows(offset, num_bytes)
