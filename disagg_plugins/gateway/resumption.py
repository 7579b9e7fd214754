"""What lets the stream of one request go on with another worker (sans-IO).

It asks workers for what the next one will need, notes it while the stream passes, writes the next
worker's request, and turns that worker's answer into the rest of the first one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway.dialect import resuming
from disagg_plugins.gateway.openai import CHAT
from disagg_plugins.gateway.sse import StreamEnd, failed_at_once
from disagg_plugins.gateway.trail import MAX_PROMPT_TOKENS, Resumed, Trail, closing, finishing

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, Dialect
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.opened import Opened
    from disagg_plugins.gateway.sse import SseObserver
    from disagg_plugins.policy import GatewayPolicy
    from disagg_plugins.telemetry.records import RequestRecord
    from disagg_plugins.types import Worker

MAX_WHOLE_BYTES = 1 << 20
"""An answer that is not a stream is held up to this length, so that a failure inside it can still
be retried; a longer one is passed on as it comes."""

MAX_OPENED_BYTES = 64 << 20
"""An answer that has to be put together is held whole; no prompt's answer is longer."""

ERROR = b'"error"'
"""Inside a JSON text the quotes would be escaped."""


class Resumption:
    """How the answer to one request could go on, and how it does.

    Args:
        parsed: The request.
        policy: Whether and how often.

    Attributes:
        times: How often the stream may go on elsewhere.
        trail: What it has said in token ids; None: that is not noted.
        tried: Names of workers that failed at it; they are not asked again.
        opened: Puts an answer together that another worker began; None: nobody did.
    """

    __slots__ = (
        "_bound",
        "_misread",
        "_parsed",
        "_resumed",
        "_why_not",
        "opened",
        "times",
        "trail",
        "tried",
    )

    def __init__(self, parsed: ParsedRequest, policy: GatewayPolicy) -> None:
        self.times = policy.resumes if policy.resume and parsed.stream else 0
        self.trail: Trail | None = None
        self.tried: list[str] = []
        self.opened: Opened | None = None
        self._parsed = parsed
        self._bound: int | None = None
        self._misread = False  # what was said answers another prompt
        self._resumed: Resumed | None = None
        self._why_not: str | None = "its events were not looked at"

    # While a worker answers

    def body(self, dialect: Dialect | None, worker: Worker, body: Body) -> Body:
        """Return the body of the first call for an answer, with the wish for token ids."""
        self.trail = None
        if not self.times:
            return body
        parsed = self._parsed
        able = resuming(dialect)
        if able is None:
            self._why_not = f"{worker.engine} workers cannot go on with an answer"
        elif parsed.opaque is not None:
            self._why_not = parsed.opaque
        elif parsed.prompt_tokens > MAX_PROMPT_TOKENS:
            self._why_not = f"a prompt of more than {MAX_PROMPT_TOKENS} tokens"
        else:
            self._why_not = able.unresumable(parsed.body, chat=parsed.endpoint == CHAT)
            if self._why_not is None:
                self.trail = Trail()
                self._bound = able.output_bound(parsed.body, chat=parsed.endpoint == CHAT)
                return able.resumable_body(body)
        return body

    def outgoing(self, data: bytes) -> bytes:
        """Return whole events as the client gets them."""
        if self._resumed is not None:
            return self._resumed.take(data)
        if self.opened is not None:
            return self.opened.stream(data)
        return data if self.trail is None else self.trail.take(data)

    @property
    def whole_bytes(self) -> int:
        """Return how much of an answer that is no stream is held before it is sent."""
        return MAX_WHOLE_BYTES if self.opened is None else MAX_OPENED_BYTES

    def whole(self, answer: bytes) -> bytes:
        """Return an answer that is no stream as the client gets it.

        Raises:
            RemoteProtocolError: It is no answer, or does not go on from what was begun.
        """
        if not answer.startswith(b"{") or not answer.rstrip().endswith(b"}"):
            raise RemoteProtocolError("its answer is not a JSON object")
        return answer if self.opened is None else self.opened.whole(answer)

    def failure(self, data: bytes) -> tuple[bytes, str | None]:
        """Return whole events up to one that tells of the worker's failure, and what it tells."""
        if self.opened is not None and (problem := self.opened.misread(data)) is not None:
            self._misread = True
            return b"", problem
        if self.trail is None or ERROR not in data:
            return data, None
        events = data.replace(b"\r\n", b"\n").split(b"\n\n")
        for index, event in enumerate(events):
            if (problem := failed_at_once(event)) is not None:
                return b"".join([e + b"\n\n" for e in events[:index]]), problem
        return data, None

    @property
    def problem(self) -> str | None:
        """Return how the next worker contradicts what the client has, or None."""
        return None if self._resumed is None else self._resumed.problem

    # When it has failed

    def missing_end(self, sse: SseObserver | None) -> bytes | None:
        """Return what is missing of an answer whose last token was sent; None: it was not."""
        parsed, trail = self._parsed, self.trail
        said = StreamEnd() if sse is None else sse.end()
        if not parsed.single or self._misread:
            return None
        chat, known = parsed.endpoint == CHAT, trail is not None and trail.problem() is None
        finish = b""
        if said.finish is None:
            if trail is None or not known or not self._at_bound(trail):
                return None
            finish = finishing(trail, "length", chat=chat)
        options = parsed.body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        if usage and (finish or said.output_tokens is None):
            if trail is None or not known:
                return None
            return finish + closing(trail, usage=True, chat=chat)
        return finish + closing(trail or Trail(), usage=False, chat=chat)

    def _at_bound(self, trail: Trail) -> bool:
        """Whether every token that was asked for is there, and with its text."""
        owes = self._resumed is not None and self._resumed.owes
        return self._bound is not None and not owes and trail.sure >= self._bound

    def obstacle(self) -> str | None:
        """Return why no other worker could go on from what was said, or None."""
        if self._misread:
            return "it answers another prompt"
        if self.trail is None:
            return self._why_not
        if self._resumed is not None and self._resumed.owes:
            return "the worker that went on failed before it had caught up"
        return self.trail.problem()

    def next_body(self, dialect: Dialect | None, worker: Worker) -> Body:
        """Return the body that asks ``worker`` for the rest; from now on, it is the one heard.

        Raises:
            LocalProtocolError: It could not go on.
        """
        trail, chat = self.trail, self._parsed.endpoint == CHAT
        able = resuming(dialect)
        if trail is None or able is None:
            raise LocalProtocolError(f"{worker.engine} workers cannot go on with an answer")
        owed = trail.cut()
        body = able.resume_body(self._parsed.body, trail.prompt, trail.ids.tolist(), chat=chat)
        self._resumed = Resumed(trail, owed)
        return body

    @property
    def context_tokens(self) -> int:
        """Return the tokens that the next worker has to read."""
        return 0 if self.trail is None else len(self.trail.prompt) + len(self.trail.ids)

    def ended(self, record: RequestRecord) -> None:
        """Write down what no single worker knew, or none was asked to tell."""
        if self.opened is not None:
            record.prompt_tokens, record.output_tokens = self.opened.counts(
                record.prompt_tokens, record.output_tokens
            )
        counts = None if self.trail is None else self.trail.counts
        if counts is not None and (self._resumed is not None or record.output_tokens is None):
            record.prompt_tokens, record.output_tokens = counts
