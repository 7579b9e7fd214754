"""Carries out the flow of one request: executes its commands, reports what happens as events.

Callbacks only, no task and no future a request: that is what keeps a request cheap. The machine
that decides is ``flow.py``; the numbers are kept in ``timeline.py``.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway import flow as f
from disagg_plugins.gateway.answers import Answers
from disagg_plugins.gateway.chunks import passing, stripping
from disagg_plugins.gateway.claims import EXPECTED, Claims
from disagg_plugins.gateway.containment import contained
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.resumption import Resumption
from disagg_plugins.gateway.sse import SseObserver, carries_output, failed_at_once, read_answer
from disagg_plugins.gateway.surroundings import Surroundings, record_of
from disagg_plugins.gateway.timeline import Timeline
from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import header_value, post
from disagg_plugins.gateway.worker_state import Work
from disagg_plugins.scheduling.prediction import expected_output
from disagg_plugins.telemetry.records import FailureRecord
from disagg_plugins.types import Disaggregated

if TYPE_CHECKING:
    from disagg_plugins.gateway.client_connection import ClientConnection
    from disagg_plugins.gateway.dialect import HandoffRef, Published
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.types import Decision, RequestProfile, Worker

log = logging.getLogger(__name__)

MAX_WHOLE_BYTES = 1 << 20
"""An answer that is not a stream is held up to this length, so that a failure inside it can still
be retried; a longer one is passed on as it comes."""

MAX_PREFILL_ANSWER_BYTES = 8 << 20
"""One token and the handoff's parameters are a few KiB."""

LEFT_S = 1.0
"""How long the worker of a client that left with its whole answer may take to end its own; then
its connection is closed instead of kept."""

FOREVER = float("inf")

encode = msgspec.json.encode


class Exchange:
    """One request on its way."""

    def __init__(
        self,
        gateway: Gateway,
        client: ClientConnection,
        parsed: ParsedRequest,
        decision: Decision,
        *,
        profile: RequestProfile,
        shared_headers: bytes,
        answer_headers: bytes,
    ) -> None:
        route = decision.route
        self.surroundings = Surroundings(gateway.read_tokens, profile.cached_tokens)
        self.profile = profile
        self._gateway = gateway
        self._client = client.answering(self)
        self._parsed = parsed
        self._shared = shared_headers
        self._route = route
        self._decode = route.decode
        self._ref: HandoffRef | None = None
        self._resumption = Resumption(parsed, gateway.policy.gateway)
        self._flow = f.Flow(self._resumption.times)
        self._times = Timeline(profile.arrival_s)
        self._calls: dict[str, Call] = {}
        self._claims = Claims(gateway.fleet)
        self._status: dict[str, int] = {}
        self._headers: dict[str, list[Header]] = {}
        self._bodies: dict[str, list[bytes]] = {"prefill": [], "decode": []}
        self._sizes_bytes = {"prefill": 0, "decode": 0}
        self._sse: SseObserver | None = None
        self._first = b""
        self._streams = False  # the answer that began is a stream
        self._whole = False
        self._slow = False
        self._over = False
        self._left = False  # the client went with its whole answer
        self._last = b""  # held back to be sent with the end of the answer
        self.prefill_deadline_s = FOREVER
        self.decode_deadline_s = FOREVER
        self.record = record_of(parsed, decision, profile.request_id)
        self._answers = Answers(self._client, answer_headers, self.record)

    @contained
    def begin(self) -> None:
        """Start: mint the handoff if there is one, make the first calls."""
        route = self._route
        if isinstance(route, Disaggregated):
            fleet = self._gateway.fleet
            self._ref = self._gateway.mint(route.prefill, route.decode)
            self._gateway.ledger.open(self._ref.handoff_id)
            self._ref = replace(self._ref, endpoints=fleet.endpoints(route.prefill.name))
            self._claims.expect(self._gateway.members, route.decode, self._decode_work(0))
            self._do(self._flow.on(f.Started(fleet.family(route.prefill, route.decode))))
        else:
            self._do(self._flow.on(f.Started(None)))

    def abandon(self, exc: Exception) -> None:
        """End the request, whatever state it is in: the gateway itself failed at it."""
        if self._over:
            log.error("after the end of request %s", self.record.request_id, exc_info=exc)
            return
        status, code, message = 500, "internal", "the gateway failed; its log says why"
        if isinstance(exc, RequestError):
            status, code, message = exc.status, exc.code or "invalid_json", exc.message
        else:
            log.error("request %s failed", self.record.request_id, exc_info=exc)
        self._flow.state = f.State.DONE
        for side in list(self._calls):
            self._cancel(f.Cancel("prefill" if side == "prefill" else "decode"))
        detail = f"{type(exc).__name__}: {exc}"[:300]
        self.record.failures.append(FailureRecord("", "gateway", code, detail))
        started = self._client.started
        try:
            if started:
                self._client.break_off(b"")
            else:
                self._answers.error(status, message, code=code)
        finally:
            self._finish(f.Finish("broken" if started else "error"))

    # What happens

    @contained
    def client_gone(self) -> None:
        """The client closed its connection."""
        if self._delivered():
            self._left = True
            self.decode_deadline_s = time.monotonic() + LEFT_S
            return
        self.record.client_gone = True
        self._do(self._flow.on(f.ClientGone()))

    def _delivered(self) -> bool:
        """Whether the client has the whole answer, though the worker has not ended it yet.

        Clients leave at the end mark, or at the finish reason of their only choice: what follows
        is usage and framing.
        """
        sse = self._sse
        streaming = self._flow.state is f.State.STREAM
        if sse is None or not streaming or sse.held or self._slow or self._client.lost_bytes:
            return False
        if sse.ended:
            return True
        single = self._parsed.body.get("n") in (None, 1) and not self._parsed.batch
        return single and sse.end().finish is not None

    def _end_left(self) -> None:
        call = self._calls.get("decode")
        if call is not None and not call.ended:
            call.cancel()
        self._do(self._flow.on(f.DecodeEnded()))

    @contained
    def close(self) -> None:
        """The gateway closes: end what still runs; nothing will be heard of it any more."""
        if self._left:
            self._end_left()
        else:
            self._do(self._flow.on(f.ClientGone()))

    @contained
    def client_slow(self, slow: bool) -> None:
        """Stop or go on reading the worker's answer."""
        call = self._calls.get("decode")
        self._slow = slow
        self._touch(time.monotonic())
        if call is not None and slow:
            call.pause()
        elif call is not None:
            call.resume()

    @contained
    def expire(self, now_s: float) -> None:
        """A deadline passed."""
        self._expire(now_s)

    def _expire(self, now_s: float) -> None:
        policy = self._gateway.policy.gateway
        if now_s > self.prefill_deadline_s:
            self.prefill_deadline_s = FOREVER
            detail = f"no answer within {policy.prefill_s:g} s (policy key gateway.prefill_s)"
            self._do(self._flow.on(f.PrefillFailed("timeout", detail)))
        if now_s <= self.decode_deadline_s:
            return
        if self._left:
            self._end_left()
            return
        if self._flow.state is f.State.STREAM and not self._slow:
            # chunks on the fast path do not move the deadline one by one
            self.decode_deadline_s = self._times.last_s + policy.idle_s
            if now_s <= self.decode_deadline_s:
                return
        self.decode_deadline_s = FOREVER
        if self._slow:
            log.warning("request %s: the client stopped reading", self.record.request_id)
            self._do(self._flow.on(f.ClientGone()))
            self._client.abort()
        elif self._flow.state is f.State.STREAM:
            detail = f"nothing more within {policy.idle_s:g} s (policy key gateway.idle_s)"
            self._do(self._flow.on(f.DecodeFailed("timeout", detail)))
        else:
            detail = f"no answer within {policy.first_byte_s:g} s (policy key gateway.first_byte_s)"
            self._do(self._flow.on(f.DecodeFailed("timeout", detail)))

    @contained
    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """The head of a worker's answer came."""
        self._status[call.side] = status
        self._headers[call.side] = headers
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
            policy = self._gateway.policy.gateway
            self.decode_deadline_s = now_s + (policy.idle_s if streaming else policy.first_byte_s)
        if self._sse is not None:
            data = self._sse.feed(data)
            if not data:
                return
        elif self._flow.state is not f.State.STREAM:
            self._keep(call, data, MAX_WHOLE_BYTES)
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
        side = call.side
        self._bodies[side].append(data)
        self._sizes_bytes[side] += len(data)
        if self._sizes_bytes[side] <= bound_bytes:
            return
        if side == "decode" and self._status[side] == 200:
            self._first = b"".join(self._bodies[side])
            self._bodies[side] = []
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
        elif self._status["decode"] != 200:
            self._do(self._flow.on(f.DecodeRejected(self._status["decode"])))
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
        status = self._status["prefill"]
        self.prefill_deadline_s = FOREVER
        self._times.prefill_end_s = time.monotonic()
        if status != 200:
            self._do(self._flow.on(f.PrefillRejected(status)))
            return
        fleet, route, ref = self._gateway.fleet, self._route, self._ref
        published: Published | None = None
        if isinstance(route, Disaggregated) and ref is not None and self._relays(route):
            dialect = fleet.dialects[route.prefill.engine]
            try:
                answer = msgspec.json.decode(b"".join(self._bodies["prefill"]))
                published = dialect.published(answer if isinstance(answer, dict) else {}, ref)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                detail = f"its answer is not JSON: {exc}"
                self._do(self._flow.on(f.PrefillFailed("garbage", detail)))
                return
            except RemoteProtocolError as exc:
                self._do(self._flow.on(f.PrefillFailed("no_handoff", str(exc))))
                return
        del self._bodies["prefill"][:], self._calls["prefill"]
        self._claims.succeeded("prefill")
        self.surroundings.read(self.record, self.record.prefill)
        self._do(self._flow.on(f.PrefillAnswered(published)))

    def _relays(self, route: Disaggregated) -> bool:
        return self._gateway.fleet.family(route.prefill, route.decode) == "relay"

    def _stream_end(self, sse: SseObserver) -> None:
        if not sse.ended and not self._left:
            detail = "the worker ended the stream before its end mark"
            self._do(self._flow.on(f.DecodeFailed("truncated", detail)))
            return
        self._last += sse.rest()
        self._claims.succeeded("decode")
        self._do(self._flow.on(f.DecodeEnded()))

    def _whole_end(self) -> None:
        body = b"".join(self._bodies["decode"])
        said = read_answer(body)
        if not body.startswith(b"{") or not body.rstrip().endswith(b"}"):
            self._do(self._flow.on(f.DecodeFailed("garbage", "its answer is not a JSON object")))
            return
        self.record.finish = said.finish
        self.record.prompt_tokens = said.prompt_tokens
        self.record.output_tokens = said.output_tokens
        self._first, self._whole = body, True
        self._times.stamp(monotonic())
        self._claims.succeeded("decode")
        self._do(self._flow.on(f.DecodeStarted()))
        self._do(self._flow.on(f.DecodeEnded()))

    # What is done about it

    def _do(self, commands: list[f.Command]) -> None:
        for command in commands:
            _EXECUTE[type(command)](self, command)

    def _send_prefill(self, _: f.Command) -> None:
        route, ref = self._route, self._ref
        if not isinstance(route, Disaggregated) or ref is None:
            return
        now_s = self._times.prefill_start_s = monotonic()
        self.prefill_deadline_s = now_s + self._gateway.policy.gateway.prefill_s
        dialect = self._gateway.fleet.dialects[route.prefill.engine]
        body = encode(dialect.prefill_body(self._parsed.body, ref))
        tokens = self._parsed.prompt_tokens
        self._send("prefill", route.prefill, body, Work(tokens, tokens))

    def _send_decode(self, command: f.Command) -> None:
        published = command.published if isinstance(command, f.SendDecode) else None
        if self._ref is None:
            return
        dialect = self._gateway.fleet.dialects[self._decode.engine]
        body = dialect.decode_body(self._parsed.body, self._ref, published)
        body = self._resumption.body(dialect, self._decode, body)
        self._send("decode", self._decode, encode(body), self._decode_work(0))

    def _decode_work(self, prompt_tokens: int) -> Work:
        """Return what this request asks of a decode worker that reads ``prompt_tokens`` itself."""
        bound = self._parsed.max_output_tokens
        return Work(prompt_tokens, self._parsed.prompt_tokens, expected_output(bound))

    def _send_local(self, command: f.Command) -> None:
        whole, gateway = self._decode.whole, self._gateway
        may = not self._flow.retries or gateway.may_retry(self.record)
        if isinstance(command, f.SendLocal) and (command.elsewhere or not (whole and may)):
            other = gateway.another_decode(self.profile, self._decode) if may else None
            if other is None and not (command.else_same and whole and may):
                self._do(self._flow.on(f.NoWorker()))
                return
            self._decode = other or self._decode
            self.record.decode = self._decode.name
        parsed = self._parsed
        dialect = gateway.fleet.dialects.get(self._decode.engine)
        body = parsed.body if dialect is None else dialect.local_body(parsed.body)
        body = self._resumption.body(dialect, self._decode, body)
        raw = parsed.raw if body is parsed.body else encode(body)
        self._send("decode", self._decode, raw, self._decode_work(parsed.prompt_tokens))

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
            body = resumption.next_body(self._gateway.fleet.dialects.get(other.engine), other)
        except LocalProtocolError as exc:
            return str(exc)
        self._decode = other
        self.record.decode = other.name
        self._send("decode", other, encode(body), self._decode_work(resumption.context_tokens))
        return None

    def _continue_answer(self, _: f.Command) -> None:
        self._claims.prompt_read("decode")
        call, data, self._first = self._calls["decode"], self._first, b""
        self._touch(time.monotonic())
        if self._slow:
            call.pause()
        self._pass_on(call, data)

    def _send(self, side: str, worker: Worker, body: bytes, work: Work) -> None:
        gateway = self._gateway
        if side == "decode":
            self._sse = None
            self._claims.leave(EXPECTED)
            self.decode_deadline_s = monotonic() + gateway.policy.gateway.first_byte_s
        self._bodies[side], self._sizes_bytes[side] = [], 0
        self.surroundings.sent(self.record, self._times, side, worker, gateway.fleet.view())
        pool, given = gateway.members.give(worker, work)
        self._claims.note(side, worker.name, given)
        path, host = self._parsed.endpoint.encode("ascii"), pool.host_header
        self._calls[side] = call = Call(side, post(path, host, self._shared, body), self)
        pool.submit(call)

    def _start_answer(self, _: f.Command) -> None:
        self._claims.prompt_read("decode")
        self.record.status = 200
        self._streams = self._sse is not None
        self.surroundings.answering(self.record)
        lines = self._answers.lines(self._headers["decode"])
        first, self._first = self._first, b""
        if self._whole:
            self._client.answer(200, first, lines)
            return
        call, (first, failure) = self._calls["decode"], self._resumption.failure(first)
        self._client.start(200, lines, self._resumption.outgoing(first))
        self._touch(time.monotonic())
        if failure is None:
            self._pass_chunks(call)
        else:
            self._failed_inside(call, failure)

    def _pass_chunks(self, call: Call) -> None:
        """Let chunks of whole events go the short way, where client and worker allow it."""
        sse, trail, stamp = self._sse, self._resumption.trail, self._times.stamp
        send = self._client.raw_writer() if sse is not None else None
        if sse is None or send is None:
            return
        slow = functools.partial(self.call_data, call)
        if trail is None:
            call.pass_chunks(passing(sse, stamp, send, slow))
        elif trail.prompt:
            call.pass_chunks(stripping(trail, sse, stamp, send, slow))

    def _touch(self, now_s: float) -> None:
        if self._flow.state is f.State.STREAM:
            self.decode_deadline_s = now_s + self._gateway.policy.gateway.idle_s

    def _complete_answer(self, _: f.Command) -> None:
        if not self._whole:
            self._client.complete(self._last)

    def _break_answer(self, command: f.Command) -> None:
        if isinstance(command, f.BreakAnswer):
            self._answers.break_off(self._last, command.message if self._streams else None)

    def _answer_verbatim(self, command: f.Command) -> None:
        side = command.side if isinstance(command, f.AnswerVerbatim) else "decode"
        body = b"".join(self._bodies[side])
        self._answers.verbatim(self._status[side], self._headers[side], body)

    def _answer_error(self, command: f.Command) -> None:
        if isinstance(command, f.AnswerError):
            self._answers.error(command.status, command.message, code=command.code)

    def _cancel(self, command: f.Command) -> None:
        side = command.side if isinstance(command, f.Cancel) else "decode"
        call = self._calls.get(side)
        if call is not None and not call.ended:
            call.cancel()
        if side == "prefill":
            self.prefill_deadline_s = FOREVER
        self._claims.leave(side)
        self._calls.pop(side, None)

    def _note(self, command: f.Command) -> None:
        if not isinstance(command, f.Note):
            return
        worker = self._claims.worker(command.side) or self.record.decode
        self.record.failures.append(
            FailureRecord(worker, command.side, command.kind, command.detail[:300])
        )
        self._gateway.worker_failed(worker, command.side, command.kind, command.detail)

    def _finish(self, command: f.Command) -> None:
        if self._over:
            return
        self._over = True
        outcome = command.outcome if isinstance(command, f.Finish) else "ok"
        self._claims.leave_all()
        record, flow = self.record, self._flow
        record.outcome = outcome
        record.retries = flow.retries
        record.resumes = flow.resumes
        self.prefill_deadline_s = self.decode_deadline_s = FOREVER
        try:
            if self._sse is not None:
                said = self._sse.end()
                record.finish = said.finish
                record.prompt_tokens = said.prompt_tokens
                record.output_tokens = said.output_tokens
            self._resumption.ended(record)
        finally:
            self._gateway.finished(self, self._times, self._ref)
            self._bodies.clear()
            self._calls.clear()


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
    f.Finish: Exchange._finish,
}
