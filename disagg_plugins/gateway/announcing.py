"""Telling a worker's adapter of a handoff before its engine is asked.

Some engines pass nothing of a request to a KV connector but a number. Their adapters listen for
*announcements*: what belongs to that number, with the ticket that proves it. The gateway sends one
and waits for the word before it makes the call itself. To decode the word means that the KV is at
hand; where it could not be fetched the call is made all the same: the worker computes the prompt.

An adapter may also be asked, when its worker has answered, for what the answer does not tell.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import post

if TYPE_CHECKING:
    from collections.abc import Callable

    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.upstream import CallListener
    from disagg_plugins.gateway.wire import Header

log = logging.getLogger(__name__)

PATH = b"/announce"
HEADERS = b"content-type: application/json\r\n"
MAX_WORD_BYTES = 1024
"""Kept of what an adapter says to an announcement, for the log."""

MAX_TOLD_BYTES = 1 << 20
"""Of what it says to a question: 100,000 token ids."""


class AnnouncedBody(bytes):
    """The body of a call that has to be announced.

    Attributes:
        announcement: The body of the announcement.
        question: The body of what is asked when the call was answered; None: nothing is.
    """

    announcement: bytes
    question: bytes | None

    @classmethod
    def of(cls, body: bytes, announcement: bytes, question: bytes | None = None) -> AnnouncedBody:
        """Return ``body`` with its announcement, and the question after it."""
        found = cls(body)
        found.announcement, found.question = announcement, question
        return found


class AnnouncedCall(Call):
    """A call that is made when its announcement was heard.

    Args:
        side: See ``Call``.
        payload: See ``Call``.
        listener: See ``Call``; it hears nothing of the announcement but its failure, and nothing of
            the question: ``told`` is what was said, or empty.
        pool: Makes the call itself.
        connect: Returns new connections to the worker's adapter.
    """

    __slots__ = ("_connect", "_pool", "_question", "_talk", "_to")

    def __init__(
        self,
        side: str,
        payload: bytes,
        listener: CallListener,
        pool: WorkerPool,
        connect: Callable[[], WorkerPool],
    ) -> None:
        super().__init__(side, payload, listener)
        self._pool, self._connect = pool, connect
        self._talk: Call | None = None
        self._to: WorkerPool | None = None
        self._question: bytes | None = None

    def begin(self, body: AnnouncedBody) -> None:
        """Send the announcement."""
        self._question = body.question
        self._say(body.announcement, _Heard(MAX_WORD_BYTES, self._announced))

    def _say(self, body: bytes, heard: _Heard) -> None:
        self._to = to = self._connect()
        self._talk = Call("announcement", post(PATH, to.host_header, HEADERS, body), heard)
        to.submit(self._talk)

    def cancel(self) -> None:
        """See ``Call``; what is said to the adapter ends with it."""
        super().cancel()
        self._over()

    def _over(self) -> None:
        talk, self._talk = self._talk, None
        if talk is not None and not talk.ended:
            talk.cancel()
        to, self._to = self._to, None
        if to is not None:
            to.close()

    def _announced(self, kind: str, problem: str, word: bytes) -> None:
        self._over()
        if self.ended:
            return
        if problem and self.side == "prefill":  # it would read a prompt for nobody
            self.ended = True
            self.listener.call_failed(self, kind, f"the announcement failed: {problem}")
            return
        if self._question is not None:
            self.listener = _Asks(self, self.listener)
        self._pool.submit(self)

    def ask(self, listener: CallListener) -> None:
        """Ask the question of an answered call; ``listener`` hears the end when that is over."""
        question, self._question = self._question, None
        self.listener = listener
        if question is None:
            listener.call_end(self)
            return
        self.ended = False  # it can be cancelled meanwhile
        self._say(question, _Heard(MAX_TOLD_BYTES, self._answered))

    def _answered(self, kind: str, problem: str, word: bytes) -> None:
        self._over()
        if self.ended:
            return
        self.ended = True
        if problem:
            log.info("worker %s: its adapter does not tell: %s", self._pool.worker.name, problem)
        else:
            self.told = word
        self.listener.call_end(self)


class _Asks:
    """Hears a call's answer for its listener; where it is a success, the question comes first."""

    __slots__ = ("_call", "_listener", "_status")

    def __init__(self, call: AnnouncedCall, listener: CallListener) -> None:
        self._call, self._listener, self._status = call, listener, 0

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        self._status = status
        self._listener.call_head(call, status, headers)

    def call_data(self, call: Call, data: bytes) -> None:
        self._listener.call_data(call, data)

    def call_end(self, call: Call) -> None:
        if self._status == 200:
            self._call.ask(self._listener)
        else:
            self._listener.call_end(call)

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        self._listener.call_failed(call, kind, detail)


class _Heard:
    """Collects what an adapter says.

    Args:
        bound_bytes: Longest answer that is taken for a success.
        tell: Is told how it ended: a word, the problem or nothing, and what was said.
    """

    __slots__ = ("_bound_bytes", "_said", "_status", "_tell")

    def __init__(self, bound_bytes: int, tell: Callable[[str, str, bytes], None]) -> None:
        self._bound_bytes, self._tell = bound_bytes, tell
        self._said = b""
        self._status = 0

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        self._status = status

    def call_data(self, call: Call, data: bytes) -> None:
        self._said += data[: self._bound_bytes + 1 - len(self._said)]

    def call_end(self, call: Call) -> None:
        problem = ""
        if self._status != 200:
            problem = f"status {self._status}: {self._said.decode('utf-8', 'replace'):.200}"
        elif len(self._said) > self._bound_bytes:
            problem = f"an answer of more than {self._bound_bytes} bytes"
        self._tell("status", problem, self._said)

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        self._tell(kind, detail, b"")
