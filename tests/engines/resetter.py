"""A proxy on loopback that resets a connection in the middle of what it carries."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Self

PIECE_BYTES = 64 * 1024
WAIT_S = 30.0
RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER`` with no time: closing sends RST."""


class Resetter:
    """Carries one connection at a time to ``target``; use it in a ``with`` statement.

    Args:
        target: ``host:port``.
        after_bytes: How much of the target's answers goes through before both ends are reset.

    Attributes:
        resets: Connections that were reset.
    """

    def __init__(self, target: str, *, after_bytes: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._left_bytes = after_bytes
        self.resets = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self._thread = threading.Thread(target=self._serve, name="resetter")

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join(WAIT_S)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.create_connection(self._target, timeout=WAIT_S)
            up = threading.Thread(target=self._carry, args=(near, far), name="resetter-up")
            up.start()
            while self._left_bytes > 0 and (data := far.recv(PIECE_BYTES)):
                near.sendall(data)
                self._left_bytes -= len(data)
            self.resets += self._left_bytes <= 0
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.close()
            up.join(WAIT_S)

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        near.settimeout(WAIT_S)
        with contextlib.suppress(OSError):
            while data := near.recv(PIECE_BYTES):
                far.sendall(data)
