"""What stands between one arm and the client's connection, for one request.

It passes everything on, and does two things on the way:

- **Elsewhere.** Where the candidate answers with a failure of its own before anything was sent, the
  baseline answers instead. The failure counts as the candidate's all the same; the client is
  spared it.
- **Tap.** The answer to a request that was copied is read as it passes, to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.canary.tap import Tap
    from disagg_plugins.gateway.client_connection import ClientConnection
    from disagg_plugins.gateway.reply import Answering, Reply
    from disagg_plugins.gateway.sending import Sender

ELSEWHERE = frozenset({404, 500, 501, 502, 503})
"""Statuses by which an arm says that it cannot: what the other one may well do. Not 504: the time
is over there, too. Not 429: a tenant that asks for more than it may would get it twice."""


class ArmClient:
    """One request's client, as its arm sees it.

    Args:
        connection: The client's.
        elsewhere: Called in place of an answer that fails; it sees to another answer. None:
            failures are passed on.
        tap: Reads the answer; None: nobody does.
    """

    __slots__ = ("_connection", "_elsewhere", "_given", "_tap")

    def __init__(
        self,
        connection: ClientConnection,
        *,
        elsewhere: Callable[[], None] | None = None,
        tap: Tap | None = None,
    ) -> None:
        self._connection = connection
        self._elsewhere = elsewhere
        self._tap = tap
        self._given = False  # another arm answers: what still comes from this one is dropped

    @property
    def chunked(self) -> bool:
        """See ``Client``; what is read on the way is not framed before."""
        return self._tap is None and self._connection.chunked

    @property
    def lost_bytes(self) -> bool:
        """See ``Client``."""
        return self._connection.lost_bytes

    def answering(self, by: Answering) -> Reply:
        """See ``Client``."""
        return self._connection.answering(by, through=self)

    def answer(self, status: int, body: bytes, lines: bytes) -> None:
        """Send a whole answer, or let another arm do it."""
        if self._given:
            return
        elsewhere, self._elsewhere = self._elsewhere, None
        if elsewhere is not None and status in ELSEWHERE and not self._connection.started:
            self._given = True
            elsewhere()
            return
        if self._tap is not None:
            self._tap.whole(status, body)
        self._connection.answer(status, body, lines)

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """See ``Client``."""
        if self._tap is not None:
            self._tap.start(status, lines, first)
        self._connection.start(status, lines, first)

    def write(self, data: bytes) -> None:
        """See ``Client``."""
        if self._tap is not None:
            self._tap.write(data)
        self._connection.write(data)

    def complete(self, last: bytes = b"") -> None:
        """See ``Client``."""
        if self._tap is not None:
            self._tap.complete(last)
        self._connection.complete(last)

    def break_off(self, last: bytes) -> None:
        """See ``Client``."""
        if not self._given:
            self._connection.break_off(last)

    def abort(self) -> None:
        """See ``Client``."""
        self._connection.abort()

    def lend(self) -> Sender:
        """See ``Client``."""
        return self._connection.lend()
