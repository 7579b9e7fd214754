"""What a worker has said of its answer, as long as another one may still be asked instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.gateway.wire import Header


class Heard:
    """The head of an answer, and the part of its body that nobody got yet.

    Attributes:
        status: The HTTP status; 0 before the head came.
        headers: The lines of the head.
        parts: Pieces of the body, in order.
        size_bytes: Their length.
    """

    __slots__ = ("headers", "parts", "size_bytes", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self.parts: list[bytes] = []
        self.size_bytes = 0

    def add(self, data: bytes) -> int:
        """Keep a piece of the body; return the length of all that is kept."""
        self.parts.append(data)
        self.size_bytes += len(data)
        return self.size_bytes

    def body(self) -> bytes:
        """Return what is kept of the body."""
        return b"".join(self.parts)

    def take(self) -> bytes:
        """Return what is kept of the body, and keep it no more."""
        body = b"".join(self.parts)
        self.parts.clear()
        self.size_bytes = 0
        return body
