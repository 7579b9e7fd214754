"""The client of a copy: an arm answers it like any other, and nobody gets the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.canary.tap import Tap
from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway.reply import Reply

if TYPE_CHECKING:
    from disagg_plugins.gateway.reply import Answering
    from disagg_plugins.gateway.sending import Sender


class CopyClient:
    """Takes one answer and reads it.

    Attributes:
        tap: What was read.
    """

    __slots__ = ("_by", "_reply", "_started", "tap")

    chunked = False
    lost_bytes = False

    def __init__(self) -> None:
        self.tap = Tap()
        self._by: Answering | None = None
        self._reply: Reply | None = None
        self._started = False

    def answering(self, by: Answering) -> Reply:
        """See ``Client``."""
        self._by = by
        self._reply = Reply(self)
        return self._reply

    def answer(self, status: int, body: bytes, lines: bytes) -> None:
        """See ``Client``."""
        if not self._started:
            self.tap.whole(status, body)
        self._end()

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """See ``Client``."""
        self._started = True
        self.tap.start(status, lines, first)

    def write(self, data: bytes) -> None:
        """See ``Client``."""
        self.tap.write(data)

    def complete(self, last: bytes = b"") -> None:
        """See ``Client``."""
        self.tap.complete(last)
        self._end()

    def break_off(self, last: bytes) -> None:
        """See ``Client``."""
        self._end()

    def abort(self) -> None:
        """See ``Client``; what a connection does when it is cut off."""
        self.cancel()

    def cancel(self) -> None:
        """Go away, so that the arm frees what it holds; after the end it is nothing."""
        by = self._by
        self._end()
        if by is not None:
            by.client_gone()

    def lend(self) -> Sender:
        """Never asked for: ``chunked`` is False.

        Raises:
            LocalProtocolError: It was.
        """
        raise LocalProtocolError("a copy's answer has no socket")

    def _end(self) -> None:
        self._by = None
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.revoke()
