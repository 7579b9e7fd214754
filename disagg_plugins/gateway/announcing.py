"""Telling a worker's adapter of a handoff before its engine is asked.

Some engines pass nothing of a request to a KV connector but a number. Their adapters listen for
*announcements*: what belongs to that number, with the ticket that proves it. The gateway sends one
and waits for the word before it makes the call itself. To decode the word means that the KV is at
hand; where it could not be fetched the call is made all the same: the worker computes the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import post

if TYPE_CHECKING:
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.upstream import CallListener
    from disagg_plugins.gateway.wire import Header

PATH = b"/announce"
HEADERS = b"content-type: application/json\r\n"
MAX_WORD_BYTES = 1024
"""Kept of what an adapter says to an announcement, for the log."""


class AnnouncedBody(bytes):
    """The body of a call that has to be announced.

    Attributes:
        announcement: The body of the announcement.
    """

    announcement: bytes

    @classmethod
    def of(cls, body: bytes, announcement: bytes) -> AnnouncedBody:
        """Return ``body`` with its announcement."""
        found = cls(body)
        found.announcement = announcement
        return found


class AnnouncedCall(Call):
    """A call that is made when its announcement was heard.

    Args:
        side: See ``Call``.
        payload: See ``Call``.
        listener: See ``Call``; it hears nothing of the announcement but its failure.
        pool: Makes the call itself.
    """

    __slots__ = ("_announcement", "_pool", "_status", "_to", "_word")

    def __init__(self, side: str, payload: bytes, listener: CallListener, pool: WorkerPool) -> None:
        super().__init__(side, payload, listener)
        self._pool = pool
        self._announcement: Call | None = None
        self._to: WorkerPool | None = None
        self._status = 0
        self._word = b""

    def begin(self, to: WorkerPool, announcement: bytes) -> None:
        """Send the announcement; ``to`` is closed when it is over."""
        self._to = to
        payload = post(PATH, to.host_header, HEADERS, announcement)
        self._announcement = Call("announcement", payload, self)
        to.submit(self._announcement)

    def cancel(self) -> None:
        """See ``Call``; the announcement ends with it."""
        super().cancel()
        self._over()

    def _over(self) -> None:
        announcement, self._announcement = self._announcement, None
        if announcement is not None and not announcement.ended:
            announcement.cancel()
        to, self._to = self._to, None
        if to is not None:
            to.close()

    # What is heard of the announcement

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """See ``CallListener``."""
        self._status = status

    def call_data(self, call: Call, data: bytes) -> None:
        """See ``CallListener``."""
        self._word = (self._word + data)[:MAX_WORD_BYTES]

    def call_end(self, call: Call) -> None:
        """See ``CallListener``."""
        word = self._word.decode("utf-8", "replace")
        problem = "" if self._status == 200 else f"status {self._status}: {word:.200}"
        self._heard("status", problem)

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        """See ``CallListener``."""
        self._heard(kind, detail)

    def _heard(self, kind: str, problem: str) -> None:
        self._over()
        if self.ended:
            return
        if problem and self.side == "prefill":  # it would read a prompt for nobody
            self.ended = True
            self.listener.call_failed(self, kind, f"the announcement failed: {problem}")
            return
        self._pool.submit(self)
