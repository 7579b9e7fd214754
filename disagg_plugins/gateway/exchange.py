"""Carries out the flow of one request: executes its commands, reports what happens as events.

Callbacks only, no task and no future a request: that is what keeps a request cheap. The machine
that decides is ``flow.py``; the numbers are kept in ``timeline.py``.
"""

from __future__ import annotations

import functools
import logging
from time import monotonic
from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway import flow as f
from disagg_plugins.gateway.answers import Answers
from disagg_plugins.gateway.bodies import Bodies, UnreadableError
from disagg_plugins.gateway.calls import HEDGE, Calls
from disagg_plugins.gateway.chunks import short_way
from disagg_plugins.gateway.containment import contained
from disagg_plugins.gateway.deadlines import FOREVER, Deadlines
from disagg_plugins.gateway.hedge import Hedge
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.resumption import Resumption
from disagg_plugins.gateway.sse import (
    SseObserver,
    StreamEnd,
    carries_output,
    failed_at_once,
    read_answer,
)
from disagg_plugins.gateway.surroundings import record_of
from disagg_plugins.gateway.timeline import Timeline
from disagg_plugins.gateway.wire import header_value
from disagg_plugins.telemetry.records import FailureRecord
from disagg_plugins.types import Disaggregated

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import HandoffRef, Published
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.upstream import Call
    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.gateway.worker_state import Work
    from disagg_plugins.types import Decision, Family, RequestProfile, Worker

log = logging.getLogger(__name__)

MAX_PREFILL_ANSWER_BYTES = 8 << 20
"""One token and the handoff's parameters are a few KiB."""


class Exchange:
    """One request on its way."""

    def __init__(
        self,
        gateway: Gateway,
        client: Client,
        parsed: ParsedRequest,
        decision: Decision,
        *,
        profile: RequestProfile,
        shared_headers: bytes,
        answer_headers: bytes,
    ) -> None:
        route = decision.route
        self.profile = profile
        self._gateway = gateway
        self._client = client.answering(self)
        self._parsed = parsed
        self._route = route
        self._decode = route.decode
        self._ref: HandoffRef | None = None
        self._family: Family | None = None
        self._resumption = Resumption(parsed, gateway.policy.gateway)
        spell = gateway.prompts.spell
        self._bodies = Bodies(parsed, gateway.fleet.dialects, self._resumption, spell)
        self._flow = f.Flow(self._resumption.times)
        self._times = Timeline(profile.arrival_s)
        self._hedge: Hedge | None = None
        self._sse: SseObserver | None = None
        self._first = b""
        self._streams = False  # the answer that began is a stream
        self._whole = False
        self._slow = False
        self._over = False
        self._left = False  # the client went with its whole answer
        self._last = b""  # held back to be sent with the end of the answer
        waits = gateway.policy.gateway
        self.deadlines = Deadlines(waits, profile.arrival_s, profile.deadline_s)
        self.record = record = record_of(parsed, decision, profile.request_id)
        self._calls = Calls(gateway, parsed.endpoint, shared_headers, profile, record, self._times)
        self._answers = Answers(self._client, answer_headers, record)

    @contained
    def begin(self) -> None:
        """Start: mint the handoff if there is one, make the first calls."""
        route = self._route
        if isinstance(route, Disaggregated):
            fleet = self._gateway.fleet
            deadline_s, endpoints = self.profile.deadline_s, fleet.endpoints(route.prefill.name)
            self._ref = self._gateway.mint(route.prefill, route.decode, deadline_s, endpoints)
            self._gateway.ledger.open(self._ref.handoff_id, observed=fleet.observed(route.prefill))
            work = self._bodies.writing(0)
            self._calls.claims.expect(self._gateway.members, route.decode, work)
            self._family = fleet.family(route.prefill, route.decode)
        self._do(self._flow.on(f.Started(self._family)))

    def abandon(self, exc: Exception) -> None:
        """End the request, whatever state it is in: the gateway itself failed at it."""
        if self._over:
            log.error("after the end of request %s", self.record.request_id, exc_info=exc)
            return
        if not isinstance(exc, RequestError):
            log.error("request %s failed", self.record.request_id, exc_info=exc)
        self._flow.state = f.State.DONE
        self._calls.end()
        started = self._client.started
        try:
            self._answers.abandoned(exc)
        finally:
            self._finish(f.Finish("broken" if started else "error"))

    # What happens

    @contained
    def client_gone(self) -> None:
        """The client closed its connection."""
        if self._delivered():
            self._left = True
            self.deadlines.left(monotonic())
            return
        self.record.client_gone = True
        self._do(self._flow.on(f.ClientGone()))

    def _delivered(self) -> bool:
        """Whether the client has the whole answer, though the worker has not ended it yet."""
        sse, streaming = self._sse, self._flow.state is f.State.STREAM
        if sse is None or not streaming or self._slow or self._client.lost_bytes:
            return False
        return sse.all_said(single=self._parsed.single)

    def _end_left(self) -> None:
        call = self._calls.open.get("decode")
        if call is not None and not call.ended:
            call.cancel()
        self._do(self._flow.on(f.DecodeEnded()))

    @contained
    def close(self) -> None:
        """The gateway closes: end what still runs, and let the client know."""
        if self._left:
            self._end_left()
        else:
            self._do(self._flow.on(f.CLOSING))

    @contained
    def client_slow(self, slow: bool) -> None:
        """Stop or go on reading the worker's answer."""
        call = self._calls.open.get("decode")
        self._slow = slow
        self._touch(monotonic())
        if call is not None and slow:
            call.pause()
        elif call is not None:
            call.resume()

    @contained
    def expire(self, now_s: float) -> None:
        """A deadline passed."""
        deadlines = self.deadlines
        if now_s > deadlines.request_s:
            self._do(self._flow.on(f.too_late(now_s - self.profile.arrival_s)))
            return
        if now_s > deadlines.prefill_s:
            deadlines.prefill_s = FOREVER
            self._do(self._flow.on(f.PrefillFailed("timeout", deadlines.late("prefill"))))
        if now_s > deadlines.decode_s:
            self._expire_decode(now_s)
        if now_s > deadlines.hedge_s:
            deadlines.hedge_s = FOREVER
            self._begin_hedge()

    def _expire_decode(self, now_s: float) -> None:
        deadlines = self.deadlines
        if self._left:
            self._end_left()
            return
        streaming = self._flow.state is f.State.STREAM
        if streaming and not self._slow:
            # chunks on the fast path do not move the deadline one by one
            deadlines.heard(self._times.last_s, begun=True)
            if now_s <= deadlines.decode_s:
                return
        deadlines.decode_s = FOREVER
        if self._slow:
            log.warning("request %s: the client stopped reading", self.record.request_id)
            self._do(self._flow.on(f.ClientGone()))
            self._client.abort()
        else:
            detail = deadlines.late("idle" if streaming else "first_byte")
            self._do(self._flow.on(f.DecodeFailed("timeout", detail)))

    @contained
    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """The head of a worker's answer came."""
        heard = self._calls.heard[call.side]
        heard.status, heard.headers = status, headers
        if call.side == "decode":
            kind = header_value(headers, b"content-type") or b""
            if status == 200 and kind.startswith(b"text/event-stream"):
                self._sse = SseObserver()
            elif status == 200 and self._flow.state is f.State.RESUME:
                self._failed_inside(call, "its answer is no stream", "garbage")

    @contained
    def call_data(self, call: Call, data: bytes) -> None:
        """Bytes of a worker's answer came."""
        if call.side == "prefill":
            self._keep(call, data, MAX_PREFILL_ANSWER_BYTES)
            return
        now_s = monotonic()
        if not self._slow and not self._left:
            streaming = self._flow.state is f.State.STREAM
            self.deadlines.heard(now_s, begun=streaming)
        if self._sse is not None:
            data = self._sse.feed(data)
            if not data:
                return
        elif self._flow.state is not f.State.STREAM:
            self._keep(call, data, self._resumption.whole_bytes)
            return
        if self._sse is None or carries_output(data):
            self._times.stamp(now_s)
        if self._flow.state is f.State.STREAM:
            self._pass_on(call, data)
        elif self._sse is not None and (problem := failed_at_once(data)) is not None:
            self._failed_inside(call, problem)
        else:
            self._first = data
            self._do(self._flow.on(f.DecodeStarted()))

    def _pass_on(self, call: Call, data: bytes) -> None:
        """Send whole events of an answer that has begun."""
        resumption = self._resumption
        data, failure = resumption.failure(data)
        if data:
            data = resumption.outgoing(data)
            if self._went_astray(call):
                return
        if failure is not None:
            self._client.write(data)
            self._failed_inside(call, failure)
        elif call.last:
            self._last = data
        elif data:
            self._client.write(data)

    def _failed_inside(self, call: Call, problem: str, kind: str = "error_event") -> None:
        call.cancel()
        self._do(self._flow.on(f.DecodeFailed(kind, problem)))

    def _went_astray(self, call: Call) -> bool:
        """Whether the next worker contradicts what the client has."""
        problem = self._resumption.problem
        if problem is not None:
            call.cancel()
            self.record.not_resumed = problem
            self._do(self._flow.on(f.NotResumable(problem)))
        return problem is not None

    def _keep(self, call: Call, data: bytes, bound_bytes: int) -> None:
        side, heard = call.side, self._calls.heard[call.side]
        if heard.add(data) <= bound_bytes:
            return
        if side == "decode" and heard.status == 200 and self._resumption.opened is None:
            self._first = heard.take()
            self._times.stamp(monotonic())
            self._do(self._flow.on(f.DecodeStarted()))
            return
        call.cancel()
        self.call_failed(call, "garbage", f"its answer exceeds {bound_bytes} bytes")

    @contained
    def call_end(self, call: Call) -> None:
        """A worker's answer is complete."""
        if call.side == "prefill":
            self._prefill_end()
        elif (status := self._calls.heard["decode"].status) != 200:
            self._do(self._flow.on(f.DecodeRejected(status)))
        elif self._sse is not None:
            self._stream_end(self._sse)
        elif self._flow.state is f.State.STREAM:
            self._do(self._flow.on(f.DecodeEnded()))
        else:
            self._whole_end()

    @contained
    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        """A worker's answer will never be complete."""
        if call.side == "prefill":
            self._do(self._flow.on(f.PrefillFailed(kind, detail)))
        elif self._sse is not None and (self._sse.ended or self._left):
            self._do(self._flow.on(f.DecodeEnded()))  # all was said; only the framing is missing
        else:
            self._do(self._flow.on(f.DecodeFailed(kind, detail)))

    def _prefill_end(self) -> None:
        calls = self._calls
        status = calls.heard["prefill"].status
        self.deadlines.prefill_s = FOREVER
        self._times.prefill_end_s = monotonic()
        if status != 200:
            self._do(self._flow.on(f.PrefillRejected(status)))
            return
        route, ref = self._route, self._ref
        published: Published | None = None
        if isinstance(route, Disaggregated) and ref is not None and self._family == "relay":
            answer, told = calls.heard["prefill"].body(), calls.open["prefill"].told
            try:
                published = self._bodies.published(route.prefill, ref, answer, told)
            except (UnreadableError, RemoteProtocolError) as exc:
                kind = "garbage" if isinstance(exc, UnreadableError) else "no_handoff"
                self._do(self._flow.on(f.PrefillFailed(kind, str(exc))))
                return
        del calls.heard["prefill"], calls.open["prefill"]
        calls.claims.succeeded("prefill")
        calls.surroundings.read(self.record, self.record.prefill)
        self._do(self._flow.on(f.PrefillAnswered(published)))

    def _stream_end(self, sse: SseObserver) -> None:
        if not sse.ended and not self._left:
            detail = "the worker ended the stream before its end mark"
            self._do(self._flow.on(f.DecodeFailed("truncated", detail)))
            return
        self._last += sse.rest()
        self._calls.claims.succeeded("decode")
        self._do(self._flow.on(f.DecodeEnded()))

    def _whole_end(self) -> None:
        body = self._calls.heard["decode"].take()
        try:
            self._first = self._resumption.whole(body)
        except RemoteProtocolError as exc:
            self._do(self._flow.on(f.DecodeFailed("garbage", str(exc))))
            return
        self._note_end(read_answer(body))
        self._whole = True
        self._times.stamp(monotonic())
        self._calls.claims.succeeded("decode")
        self._do(self._flow.on(f.DecodeStarted()))
        self._do(self._flow.on(f.DecodeEnded()))

    def _note_end(self, said: StreamEnd) -> None:
        record = self.record
        record.finish = said.finish
        record.prompt_tokens, record.output_tokens = said.prompt_tokens, said.output_tokens

    # What is done about it

    def _do(self, commands: list[f.Command]) -> None:
        for command in commands:
            _EXECUTE[type(command)](self, command)

    def _send_prefill(self, _: f.Command) -> None:
        route, ref = self._route, self._ref
        if not isinstance(route, Disaggregated) or ref is None:
            return
        self._times.prefill_start_s = monotonic()
        body = self._bodies.prefill(route.prefill, ref)
        self._send("prefill", route.prefill, body, self._bodies.reading())

    def _send_decode(self, command: f.Command) -> None:
        published = command.published if isinstance(command, f.SendDecode) else None
        if self._ref is not None:
            body = self._bodies.decode(self._decode, self._ref, published)
            self._send("decode", self._decode, body, self._bodies.writing(0))

    def _send_local(self, command: f.Command) -> None:
        if self._hedge is not None:  # somebody else is at it already
            self._adopt(command)
            return
        self._resumption.opened = None
        whole, gateway = self._decode.whole, self._gateway
        may = not self._flow.retries or gateway.may_retry(self.record)
        if isinstance(command, f.SendLocal) and (command.elsewhere or not (whole and may)):
            other = gateway.another_decode(self.profile, self._decode) if may else None
            if other is None and not (command.else_same and whole and may):
                self._do(self._flow.on(f.NoWorker()))
                return
            self._decode = other or self._decode
            self.record.decode = self._decode.name
        work = self._bodies.writing(self._parsed.prompt_tokens)
        self._send("decode", self._decode, self._bodies.whole(self._decode), work)

    def _begin_hedge(self) -> None:
        """Ask another worker for an answer that has not begun, if one is there and may be asked."""
        gateway = self._gateway
        if self._flow.state not in f.NOT_BEGUN or self._flow.retries:
            return
        other = gateway.another_decode(self.profile, self._decode, ())
        if other is None or not gateway.retries.take(monotonic()):
            return
        load, heard = gateway.fleet.load(other.name), (self._hedge_speaks, self._hedge_failed)
        self._hedge = Hedge(other, load, self._calls, *heard)
        work = self._bodies.writing(self._parsed.prompt_tokens)
        self._calls.send(HEDGE, other, self._bodies.whole(other), work, self._hedge)

    @contained
    def _hedge_speaks(self, data: bytes) -> None:
        self._first = data
        self._do(self._flow.on(f.HedgeAnswers()))

    @contained
    def _hedge_failed(self, kind: str, detail: str) -> None:
        hedge = self._hedge
        self._end_hedge("failed")
        if hedge is not None:
            self._gateway.worker_failed(hedge.worker.name, "decode", kind, detail)

    def _adopt(self, _: f.Command) -> None:
        """Let the hedge answer, from what it has said on."""
        hedge, self._hedge = self._hedge, None
        if hedge is None:
            return
        self._resumption.opened = None
        call = self._calls.adopt(hedge, self)
        self._decode = hedge.worker
        self.record.decode = hedge.worker.name
        self.record.hedge = "won"
        self._sse = None
        self.deadlines.sent("decode", monotonic())
        heard, first = self._calls.heard["decode"], self._first
        self._first = b""
        if heard.status:
            self.call_head(call, heard.status, heard.headers)
        if first:
            self.call_data(call, first)

    def _end_hedge(self, end: str) -> None:
        hedge, self._hedge = self._hedge, None
        if hedge is not None:
            self.record.hedge = end
            self._calls.cancel(HEDGE)

    def _resume(self, _: f.Command) -> None:
        if self._last:
            self._client.write(self._last)
            self._last = b""
        missing = self._resumption.missing_end(self._sse)
        if missing is not None:
            self._last = missing
            self._do(self._flow.on(f.AllSaid()))
            return
        why_not = self._resumption.obstacle() or self._go_on_elsewhere()
        if why_not is not None:
            self.record.not_resumed = why_not
            self._do(self._flow.on(f.NotResumable(why_not)))

    def _go_on_elsewhere(self) -> str | None:
        """Ask another worker for the rest of the answer, or return why that cannot be."""
        resumption, failed = self._resumption, self._decode
        resumption.tried.append(failed.name)
        other = self._gateway.another_decode(self.profile, failed, resumption.tried)
        if other is None:
            return "there is no other worker that can go on"
        try:
            body = self._bodies.rest(other)
        except LocalProtocolError as exc:
            return str(exc)
        self._decode = other
        self.record.decode = other.name
        self._send("decode", other, body, self._bodies.writing(resumption.context_tokens))
        return None

    def _continue_answer(self, _: f.Command) -> None:
        self._calls.claims.prompt_read("decode")
        call, data, self._first = self._calls.open["decode"], self._first, b""
        self._touch(monotonic())
        if self._slow:
            call.pause()
        self._pass_on(call, data)

    def _send(self, side: str, worker: Worker, body: bytes, work: Work) -> None:
        if side == "decode":
            self._sse = None
        self.deadlines.sent(side, monotonic())
        self._calls.send(side, worker, body, work, self)

    def _start_answer(self, _: f.Command) -> None:
        self._calls.claims.prompt_read("decode")
        self._end_hedge("lost")
        self.record.status = 200
        self._streams = self._sse is not None
        self._calls.surroundings.answering(self.record)
        lines = self._answers.lines(self._calls.heard["decode"].headers)
        first, self._first = self._first, b""
        if self._whole:
            self._client.answer(200, first, lines)
            return
        call, (first, failure) = self._calls.open["decode"], self._resumption.failure(first)
        self._client.start(200, lines, self._resumption.outgoing(first))
        self._touch(monotonic())
        if failure is None:
            self._pass_chunks(call)
        else:
            self._failed_inside(call, failure)

    def _pass_chunks(self, call: Call) -> None:
        """Let chunks of whole events go the short way, where client and worker allow it."""
        sse, send = self._sse, self._client.raw_writer() if self._sse is not None else None
        if sse is None or send is None or self._resumption.opened is not None:
            return
        slow = functools.partial(self.call_data, call)
        take = short_way(self._resumption.trail, sse, self._times.stamp, send, slow)
        if take is not None:
            call.pass_chunks(take)

    def _touch(self, now_s: float) -> None:
        if self._flow.state is f.State.STREAM:
            self.deadlines.heard(now_s, begun=True)

    def _complete_answer(self, _: f.Command) -> None:
        if not self._whole:
            self._client.complete(self._last)

    def _break_answer(self, command: f.Command) -> None:
        if isinstance(command, f.BreakAnswer):
            self._answers.break_off(self._last, command, events=self._streams)

    def _answer_verbatim(self, command: f.Command) -> None:
        said = command if isinstance(command, f.AnswerVerbatim) else f.AnswerVerbatim("decode")
        if said.answer is not None:
            self._answers.whole(said.answer, self._bodies.as_asked(said.answer), self._times)
            return
        heard = self._calls.heard[said.side]
        self._answers.verbatim(heard.status, heard.headers, heard.body())

    def _answer_error(self, command: f.Command) -> None:
        if isinstance(command, f.AnswerError):
            self._answers.error(command.status, command.message, code=command.code)

    def _cancel(self, command: f.Command) -> None:
        side = command.side if isinstance(command, f.Cancel) else "decode"
        if side == "prefill":
            self.deadlines.prefill_s = FOREVER
        self._calls.cancel(side)

    def _note(self, command: f.Command) -> None:
        if not isinstance(command, f.Note):
            return
        worker = self._calls.claims.worker(command.side) or self.record.decode
        self.record.failures.append(
            FailureRecord(worker, command.side, command.kind, command.detail[:300])
        )
        self._gateway.worker_failed(worker, command.side, command.kind, command.detail)

    def _finish(self, command: f.Command) -> None:
        if self._over:
            return
        self._over = True
        outcome = command.outcome if isinstance(command, f.Finish) else "ok"
        self._end_hedge("lost")
        self._calls.end()
        record, flow = self.record, self._flow
        record.outcome = outcome
        record.retries = flow.retries
        record.resumes = flow.resumes
        self.deadlines.over()
        try:
            if self._sse is not None:
                self._note_end(self._sse.end())
            self._resumption.ended(record)
            self._times.at_once = 1 if self._resumption.opened is None else 2
        finally:
            self._calls.surroundings.ended(record)
            self._gateway.finished(self, self._times, self._ref)


_EXECUTE = {
    f.SendPrefill: Exchange._send_prefill,
    f.SendDecode: Exchange._send_decode,
    f.SendLocal: Exchange._send_local,
    f.Resume: Exchange._resume,
    f.ContinueAnswer: Exchange._continue_answer,
    f.StartAnswer: Exchange._start_answer,
    f.CompleteAnswer: Exchange._complete_answer,
    f.BreakAnswer: Exchange._break_answer,
    f.AnswerVerbatim: Exchange._answer_verbatim,
    f.AnswerError: Exchange._answer_error,
    f.Cancel: Exchange._cancel,
    f.Note: Exchange._note,
    f.Adopt: Exchange._adopt,
    f.Finish: Exchange._finish,
}
