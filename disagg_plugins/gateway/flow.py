"""One request's way through the gateway: events in, commands out (sans-IO).

Rules, all of which live in this file:

* A *local* request is one call to a decode worker. A *relay* handoff calls prefill, then decode
  with what prefill answered. A *rendezvous* handoff calls both at once.
* Prefill fails (refused, time-out, 5xx, garbage, no handoff in its answer; 404, 408 and 429 too):
  the decode worker computes the prompt itself. Slower, never lost. Where its engine cannot, a
  worker that serves whole requests takes over; where there is none, the client gets the error.
* Prefill answers another 4xx, or has ended the answer already: the client gets that.
* Decode fails before a byte of its answer reached the client: one retry without the handoff, on
  another decode worker where there is one, if the budget of retries allows it (the executor says
  ``NoWorker`` where not). A 4xx that follows an accepted prefill is retried on the same worker:
  what differs is the handoff. Then the client gets a clear error.
* Decode fails later: the stream goes on from the tokens already sent, on another decode worker,
  ``resumes`` times at most. An answer whose finish reason was sent is completed instead. Where
  neither can be done the stream is broken off visibly, saying why. Nothing is ever repeated to a
  client. A resumed call that is refused counts like one that failed.
* The client goes: all upstream calls are cancelled at once. So they are when the request's own
  deadline passes or the gateway closes: the client hears of it, and no worker is blamed.
* A hedge is a second call for an answer that has not begun. If it speaks first, the other calls are
  cancelled and it is the decode call from then on.
* Every request ends with exactly one ``Finish``; after it, events have no effect.

After ``Started`` the executor reports what happens; bytes that follow ``DecodeStarted`` are not
events (they would cost more than they tell).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

from disagg_plugins.errors import LocalProtocolError

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, Published
    from disagg_plugins.types import Family

Side = Literal["prefill", "decode"]


class State(Enum):
    """Where a request is."""

    NEW = "new"
    PREFILL = "prefill"
    BOTH = "both"
    DECODE = "decode"
    STREAM = "stream"
    RESUME = "resume"
    DONE = "done"


DEADLINE = "deadline_exceeded"

NOT_BEGUN = frozenset({State.PREFILL, State.BOTH, State.DECODE})
"""Where the client has nothing of its answer yet."""


# Events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The route is decided; ``family`` is None for a local route."""

    family: Family | None


@dataclass(frozen=True, slots=True)
class PrefillAnswered:
    """Prefill answered 200; ``published`` is what its dialect read (None in rendezvous)."""

    published: Published | None


@dataclass(frozen=True, slots=True)
class PrefillRejected:
    """Prefill answered completely, with a status other than 200."""

    status: int


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """Prefill gave no usable answer; ``kind`` is a word for metrics, ``detail`` for people."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class DecodeStarted:
    """The first bytes of a 200 answer are at hand."""


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    """The answer is complete."""


@dataclass(frozen=True, slots=True)
class DecodeRejected:
    """Decode answered completely, with a status other than 200."""

    status: int


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """Decode gave no complete answer."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class NoWorker:
    """``SendLocal`` could not be done: no other worker is there."""


@dataclass(frozen=True, slots=True)
class NotResumable:
    """``Resume`` could not be done, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class AllSaid:
    """``Resume`` found that the client has the whole answer but for its end mark."""


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client closed its connection."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """The gateway ends the request: its deadline passed, or the gateway closes.

    Attributes:
        message: Why, for the client.
        status: HTTP status, where an answer has not begun.
        code: A word for programs.
        outcome: How the request ends.
    """

    message: str
    status: int
    code: str
    outcome: str


@dataclass(frozen=True, slots=True)
class HedgeAnswers:
    """The hedge has an answer at hand before any other call."""


Event = (
    Started
    | PrefillAnswered
    | PrefillRejected
    | PrefillFailed
    | DecodeStarted
    | DecodeEnded
    | DecodeRejected
    | DecodeFailed
    | NoWorker
    | NotResumable
    | AllSaid
    | ClientGone
    | CutOff
    | HedgeAnswers
)


def too_late(after_s: float) -> CutOff:
    """Return the end of a request whose deadline passed, so long after its arrival."""
    problem = f"the request's deadline passed {after_s:.2f} s after its arrival"
    return CutOff(problem, 504, DEADLINE, "deadline")


CLOSING = CutOff(
    "the gateway is shutting down (policy key gateway.drain_s)", 503, "shutting_down", "closed"
)


# Commands ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Call the prefill worker."""


@dataclass(frozen=True, slots=True)
class SendDecode:
    """Call the decode worker with the handoff."""

    published: Published | None


@dataclass(frozen=True, slots=True)
class SendLocal:
    """Call a decode worker without the handoff.

    Attributes:
        elsewhere: False: the worker of the route. True: another one, if there is any.
        else_same: With ``elsewhere``, take the same worker when there is no other.
    """

    elsewhere: bool = False
    else_same: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Call another decode worker to go on from the tokens already sent."""


@dataclass(frozen=True, slots=True)
class ContinueAnswer:
    """Send the bytes at hand after those already sent; more bytes follow them."""


@dataclass(frozen=True, slots=True)
class StartAnswer:
    """Send the head and the bytes at hand to the client; from now on, bytes pass directly."""


@dataclass(frozen=True, slots=True)
class CompleteAnswer:
    """End the client's answer properly."""


@dataclass(frozen=True, slots=True)
class BreakAnswer:
    """End the client's answer so that it cannot be taken for complete."""

    message: str
    status: int = 502
    code: str = "upstream_broke_off"


@dataclass(frozen=True, slots=True)
class AnswerVerbatim:
    """Give the client the complete answer of one side, or ``answer`` in the form it asked for."""

    side: Side
    answer: Body | None = None


@dataclass(frozen=True, slots=True)
class AnswerError:
    """Give the client an error of the gateway's own."""

    status: int
    message: str
    code: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Close the upstream call of one side; the worker sees the disconnect and aborts."""

    side: Side


@dataclass(frozen=True, slots=True)
class Note:
    """Count and record a failure of one side."""

    side: Side
    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Make the hedge the decode call, with what it has said."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The request is over.

    ``ok``, ``rejected``, ``error``, ``broken``, ``deadline``, ``closed`` or ``client_gone``.
    """

    outcome: str


Command = (
    SendPrefill
    | SendDecode
    | SendLocal
    | Resume
    | ContinueAnswer
    | StartAnswer
    | CompleteAnswer
    | BreakAnswer
    | AnswerVerbatim
    | AnswerError
    | Cancel
    | Note
    | Adopt
    | Finish
)

NOT_THE_CLIENTS_FAULT = frozenset({404, 408, 429})
"""4xx answers of a prefill worker that speak of the worker, not of the request."""

STATUS_OF = {"refused": 503, "unreachable": 503, "gone": 503, "drained": 503, "timeout": 504}
"""What a failed decode becomes for the client; everything else is 502."""


class Flow:
    """The state of one request.

    Args:
        resumes: How often a stream may go on elsewhere; 0: it breaks off.

    Attributes:
        state: Where it is.
        retries: Decode calls beyond the first, before an answer began.
        resumes: Decode calls after one failed inside its answer.
        handoff: Whether the decode call in progress carries the handoff.
        fell_back: Why the handoff was given up, or None.
    """

    __slots__ = (
        "_last_failure",
        "_prefill_open",
        "_rejected",
        "_resumes_left",
        "fell_back",
        "handoff",
        "resumes",
        "retries",
        "state",
    )

    def __init__(self, resumes: int = 0) -> None:
        self._resumes_left = resumes
        self.resumes = 0
        self.state = State.NEW
        self.retries = 0
        self.handoff = False
        self.fell_back: str | None = None
        self._prefill_open = False
        self._last_failure = DecodeFailed("none", "")
        self._rejected = False  # the last decode call, as the client's mistake

    def on(self, event: Event) -> list[Command]:
        """Take an event; return what to do, in order.

        Raises:
            LocalProtocolError: The event cannot happen in this state.
        """
        if self.state is State.DONE:
            return []
        handler = _TABLE.get((self.state, type(event)))
        if handler is None:
            raise LocalProtocolError(f"event {event!r} in state {self.state.value}")
        return handler(self, event)

    # Each handler returns the commands and leaves the next state in self.state.

    def _started(self, event: Event) -> list[Command]:
        family = event.family if isinstance(event, Started) else None
        if family is None:
            self.state = State.DECODE
            return [SendLocal()]
        self._prefill_open = True
        if family == "relay":
            self.state = State.PREFILL
            return [SendPrefill()]
        self.state = State.BOTH
        self.handoff = True
        return [SendPrefill(), SendDecode(None)]

    def _prefill_answered(self, event: Event) -> list[Command]:
        self._prefill_open = False
        was, self.state = self.state, State.DECODE
        if was is State.BOTH:
            return []
        published = event.published if isinstance(event, PrefillAnswered) else None
        if published is not None and published.answer is not None:
            self.state = State.DONE
            return [AnswerVerbatim("prefill", published.answer), Finish("ok")]
        self.handoff = True
        return [SendDecode(published)]

    def _prefill_rejected(self, event: Event) -> list[Command]:
        status = event.status if isinstance(event, PrefillRejected) else 0
        if 400 <= status < 500 and status not in NOT_THE_CLIENTS_FAULT:
            self._prefill_open = False
            self.state, was = State.DONE, self.state
            both: list[Command] = [Cancel("decode")] if was is State.BOTH else []
            return [*both, AnswerVerbatim("prefill"), Finish("rejected")]
        return self._fall_back(f"http_{status}", f"the prefill worker answered {status}")

    def _prefill_failed(self, event: Event) -> list[Command]:
        if not isinstance(event, PrefillFailed):
            raise LocalProtocolError(f"not a prefill failure: {event!r}")
        return self._fall_back(event.kind, event.detail)

    def _fall_back(self, kind: str, detail: str) -> list[Command]:
        self._prefill_open = False
        self.handoff = False
        self.fell_back = f"prefill {kind}"
        self._last_failure = DecodeFailed(kind, detail)  # told if nobody can do without
        was, self.state = self.state, State.DECODE
        both: list[Command] = [Cancel("decode")] if was is State.BOTH else []
        return [Note("prefill", kind, detail), Cancel("prefill"), *both, SendLocal()]

    def _prefill_late(self, event: Event) -> list[Command]:
        """Prefill ended while decode is already answering: only noted."""
        self._prefill_open = False
        if isinstance(event, PrefillFailed):
            return [Note("prefill", event.kind, event.detail)]
        if isinstance(event, PrefillRejected):
            return [Note("prefill", f"http_{event.status}", "after decode had begun")]
        return []

    def _decode_started(self, event: Event) -> list[Command]:
        self.state = State.STREAM
        return [StartAnswer()]

    def _decode_ended(self, event: Event) -> list[Command]:
        self.state = State.DONE
        return [*self._cancel_prefill(), CompleteAnswer(), Finish("ok")]

    def _decode_rejected(self, event: Event) -> list[Command]:
        status = event.status if isinstance(event, DecodeRejected) else 0
        theirs = status >= 500 or status in NOT_THE_CLIENTS_FAULT
        kind, detail = f"http_{status}", f"the decode worker answered {status}"
        self._last_failure = DecodeFailed(kind, detail)
        self._rejected = not theirs
        if self.retries == 0 and (self.handoff or theirs):
            return self._retry(kind, detail, elsewhere=theirs, else_same=self.handoff)
        self.state = State.DONE
        cancel = self._cancel_prefill()
        if status >= 500 and status != 503:
            return [*cancel, Note("decode", kind, detail), self._error(), Finish("error")]
        noted: list[Command] = [Note("decode", kind, detail)] if theirs else []
        return [*cancel, *noted, AnswerVerbatim("decode"), Finish("rejected")]

    def _decode_failed(self, event: Event) -> list[Command]:
        if not isinstance(event, DecodeFailed):
            raise LocalProtocolError(f"not a decode failure: {event!r}")
        self._last_failure = event
        if self.retries == 0:
            same = self.handoff and event.kind not in STATUS_OF
            return self._retry(event.kind, event.detail, elsewhere=True, else_same=same)
        self.state = State.DONE
        note = Note("decode", event.kind, event.detail)
        return [note, Cancel("decode"), *self._cancel_prefill(), self._error(), Finish("error")]

    def _retry(self, kind: str, detail: str, *, elsewhere: bool, else_same: bool) -> list[Command]:
        if self.handoff:
            self.fell_back = f"decode {kind}"
        self.retries += 1
        self.handoff = False
        self.state = State.DECODE
        return [
            Note("decode", kind, detail),
            Cancel("decode"),
            *self._cancel_prefill(),
            SendLocal(elsewhere=elsewhere, else_same=else_same),
        ]

    def _no_worker(self, event: Event) -> list[Command]:
        self.state = State.DONE
        if self._rejected:
            return [AnswerVerbatim("decode"), Finish("rejected")]
        return [self._error(), Finish("error")]

    def _broken(self, event: Event) -> list[Command]:
        if isinstance(event, DecodeRejected):
            event = DecodeFailed(f"http_{event.status}", f"a decode worker answered {event.status}")
        if not isinstance(event, DecodeFailed):
            raise LocalProtocolError(f"not a decode failure: {event!r}")
        self._last_failure = event
        over: list[Command] = [
            Note("decode", event.kind, event.detail),
            Cancel("decode"),
            *self._cancel_prefill(),
        ]
        if self._resumes_left > 0:
            self._resumes_left -= 1
            self.state = State.RESUME
            return [*over, Resume()]
        self.state = State.DONE
        return [*over, BreakAnswer(f"the answer broke off: {event.detail}"), Finish("broken")]

    def _resumed(self, event: Event) -> list[Command]:
        self.state = State.STREAM
        self.resumes += 1
        return [ContinueAnswer()]

    def _not_resumable(self, event: Event) -> list[Command]:
        self.state = State.DONE
        why = event.why if isinstance(event, NotResumable) else "no other worker can go on"
        message = f"the answer broke off: {self._last_failure.detail}; it was not resumed: {why}"
        return [Cancel("decode"), BreakAnswer(message), Finish("broken")]

    def _all_said(self, event: Event) -> list[Command]:
        self.state = State.DONE
        return [CompleteAnswer(), Finish("ok")]

    def _client_gone(self, event: Event) -> list[Command]:
        was, self.state = self.state, State.DONE
        decode: list[Command] = [] if was in (State.NEW, State.PREFILL) else [Cancel("decode")]
        return [*self._cancel_prefill(), *decode, Finish("client_gone")]

    def _cut_off(self, event: Event) -> list[Command]:
        if not isinstance(event, CutOff):
            raise LocalProtocolError(f"not a cut: {event!r}")
        begun = self.state in (State.STREAM, State.RESUME)
        over = self._client_gone(event)[:-1]
        if begun:
            last: Command = BreakAnswer(event.message, event.status, event.code)
        else:
            last = AnswerError(event.status, event.message, event.code)
        return [*over, last, Finish(event.outcome)]

    def _hedge_answers(self, event: Event) -> list[Command]:
        was, self.state = self.state, State.DECODE
        if self.handoff or was is State.PREFILL:
            self.fell_back = "hedged"
        self.handoff = False
        decode: list[Command] = [] if was is State.PREFILL else [Cancel("decode")]
        return [*self._cancel_prefill(), *decode, Adopt()]

    def _cancel_prefill(self) -> list[Command]:
        if not self._prefill_open:
            return []
        self._prefill_open = False
        return [Cancel("prefill")]

    def _error(self) -> AnswerError:
        failure = self._last_failure
        status = STATUS_OF.get(failure.kind, 502)
        return AnswerError(status, f"no worker could answer: {failure.detail}", failure.kind)


Handler = Callable[[Flow, Event], list[Command]]

_F = Flow
_TABLE: Mapping[tuple[State, type], Handler] = {
    (State.NEW, Started): _F._started,
    (State.NEW, ClientGone): _F._client_gone,
    (State.NEW, CutOff): _F._cut_off,
    (State.PREFILL, PrefillAnswered): _F._prefill_answered,
    (State.PREFILL, PrefillRejected): _F._prefill_rejected,
    (State.PREFILL, PrefillFailed): _F._prefill_failed,
    (State.PREFILL, ClientGone): _F._client_gone,
    (State.PREFILL, CutOff): _F._cut_off,
    (State.PREFILL, HedgeAnswers): _F._hedge_answers,
    (State.BOTH, PrefillAnswered): _F._prefill_answered,
    (State.BOTH, PrefillRejected): _F._prefill_rejected,
    (State.BOTH, PrefillFailed): _F._prefill_failed,
    (State.BOTH, DecodeStarted): _F._decode_started,
    (State.BOTH, DecodeEnded): _F._decode_ended,
    (State.BOTH, DecodeRejected): _F._decode_rejected,
    (State.BOTH, DecodeFailed): _F._decode_failed,
    (State.BOTH, ClientGone): _F._client_gone,
    (State.BOTH, CutOff): _F._cut_off,
    (State.BOTH, HedgeAnswers): _F._hedge_answers,
    (State.DECODE, DecodeStarted): _F._decode_started,
    (State.DECODE, DecodeEnded): _F._decode_ended,
    (State.DECODE, DecodeRejected): _F._decode_rejected,
    (State.DECODE, DecodeFailed): _F._decode_failed,
    (State.DECODE, NoWorker): _F._no_worker,
    (State.DECODE, ClientGone): _F._client_gone,
    (State.DECODE, CutOff): _F._cut_off,
    (State.DECODE, HedgeAnswers): _F._hedge_answers,
    (State.STREAM, DecodeEnded): _F._decode_ended,
    (State.STREAM, DecodeFailed): _F._broken,
    (State.STREAM, PrefillAnswered): _F._prefill_late,
    (State.STREAM, PrefillRejected): _F._prefill_late,
    (State.STREAM, PrefillFailed): _F._prefill_late,
    (State.STREAM, ClientGone): _F._client_gone,
    (State.STREAM, CutOff): _F._cut_off,
    (State.STREAM, NotResumable): _F._not_resumable,
    (State.RESUME, DecodeStarted): _F._resumed,
    (State.RESUME, DecodeRejected): _F._broken,
    (State.RESUME, DecodeFailed): _F._broken,
    (State.RESUME, NoWorker): _F._not_resumable,
    (State.RESUME, NotResumable): _F._not_resumable,
    (State.RESUME, AllSaid): _F._all_said,
    (State.RESUME, ClientGone): _F._client_gone,
    (State.RESUME, CutOff): _F._cut_off,
}
