"""The right to answer one request, which ends with that answer.

A client's connection carries many requests. Whoever answers one of them holds a reply instead of
the connection: once the answer is complete, whatever still comes from there is dropped. So no
fault in one request can put bytes into the answer of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.gateway.sending import Sender


class Answering(Protocol):
    """Whoever is making the answer."""

    def client_gone(self) -> None:
        """The connection is closed."""
        ...

    def client_slow(self, slow: bool) -> None:
        """Unsent bytes passed the upper bound (True) or fell below the lower one (False)."""
        ...


class Client(Protocol):
    """Who gets an answer: a connection, or what stands between it and an arm of a canary."""

    @property
    def chunked(self) -> bool:
        """Whether the bytes of the answer may be written with their framing (``lend``)."""
        ...

    @property
    def lost_bytes(self) -> bool:
        """Whether bytes of the answer could not be handed to the kernel."""
        ...

    def answering(self, by: Answering) -> Reply:
        """Name who answers, and is told when the client goes or is slow."""
        ...

    def answer(self, status: int, body: bytes, lines: bytes) -> None:
        """Send a whole answer."""
        ...

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """Send the head of an answer of unknown length and its first bytes."""
        ...

    def write(self, data: bytes) -> None:
        """Send more of an answer that was started."""
        ...

    def complete(self, last: bytes = b"") -> None:
        """End an answer that was started; ``last`` goes out with the end in one write."""
        ...

    def break_off(self, last: bytes) -> None:
        """End an answer that was started so that it cannot be taken for complete."""
        ...

    def abort(self) -> None:
        """Close the connection at once, unsent bytes and all."""
        ...

    def lend(self) -> Sender:
        """Return a sender for one answer, to be revoked at its end."""
        ...


class Reply:
    """What one request may send to its client."""

    __slots__ = ("_connection", "_sender", "open", "started")

    def __init__(self, connection: Client) -> None:
        self._connection = connection
        self._sender: Sender | None = None
        self.open = True
        self.started = False

    def revoke(self) -> None:
        """The answer is over, or the connection is gone."""
        self.open = False
        if self._sender is not None:
            self._sender.revoke()

    def answer(self, status: int, body: bytes, lines: bytes) -> None:
        """Send a whole answer."""
        if self.open:
            self._connection.answer(status, body, lines)

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """Send the head of an answer of unknown length and its first bytes."""
        if self.open:
            self.started = True
            self._connection.start(status, lines, first)

    def write(self, data: bytes) -> None:
        """Send more of an answer that was started."""
        if self.open:
            self._connection.write(data)

    def complete(self, last: bytes = b"") -> None:
        """End an answer that was started; ``last`` goes out with the end in one write."""
        if self.open:
            self._connection.complete(last)

    def break_off(self, last: bytes) -> None:
        """End an answer that was started so that it cannot be taken for complete."""
        if self.open:
            self._connection.break_off(last)

    def abort(self) -> None:
        """Close the connection at once, unsent bytes and all."""
        if self.open:
            self._connection.abort()

    def raw_writer(self) -> Callable[[bytes], None] | None:
        """Return what takes bytes with their chunk framing; None when no chunks are used."""
        if not self.open or not self._connection.chunked:
            return None
        self._sender = self._connection.lend()
        return self._sender.send

    @property
    def lost_bytes(self) -> bool:
        """Whether bytes of the answer could not be handed to the kernel."""
        lent = self._sender
        return self._connection.lost_bytes or (lent is not None and lent.failed)
