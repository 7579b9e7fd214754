"""Carries out the flow of one request: executes its commands, reports what happens as events.

Callbacks only, no task and no future a request: that is what keeps a request cheap. The machine
that decides is ``flow.py``; the numbers are kept in ``timeline.py``.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import msgspec

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway import flow as f
from disagg_plugins.gateway.dialect import ResumingDialect
from disagg_plugins.gateway.fleet import Work, expected_output
from disagg_plugins.gateway.openai import CHAT
from disagg_plugins.gateway.refusals import RequestError, error_body
from disagg_plugins.gateway.sse import (
    OUTPUT,
    OUTPUT_SPACED,
    SseObserver,
    StreamEnd,
    carries_output,
    failed_at_once,
    read_answer,
)
from disagg_plugins.gateway.surroundings import NOTHING_CACHED, Surroundings
from disagg_plugins.gateway.timeline import Timeline
from disagg_plugins.gateway.trail import MAX_PROMPT_TOKENS, Resumed, Trail, closing
from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import NOT_DOWNSTREAM, forwarded, header_value, post
from disagg_plugins.telemetry.records import FailureRecord, RequestRecord
from disagg_plugins.types import Decision, Disaggregated, Worker

if TYPE_CHECKING:
    from disagg_plugins.gateway.client_connection import ClientConnection
    from disagg_plugins.gateway.dialect import Body, Dialect, HandoffRef, Published
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.wire import Header

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

P = ParamSpec("P")


def _contained(
    method: Callable[Concatenate[Exchange, P], None],
) -> Callable[Concatenate[Exchange, P], None]:
    """Make a way into an exchange safe: whatever fails inside ends this request and no other."""

    @functools.wraps(method)
    def contained(self: Exchange, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as exc:
            self.abandon(exc)

    return contained


class Exchange:
    """One request on its way."""

    def __init__(
        self,
        gateway: Gateway,
        client: ClientConnection,
        parsed: ParsedRequest,
        decision: Decision,
        *,
        request_id: str,
        shared_headers: bytes,
        answer_headers: bytes,
        arrival_s: float,
        cached_tokens: Mapping[str, int] = NOTHING_CACHED,
    ) -> None:
        route = decision.route
        self.surroundings = Surroundings(gateway.read_tokens, cached_tokens)
        self._gateway = gateway
        self._client = client.answering(self)
        self._parsed = parsed
        self._decision = decision
        self._shared = shared_headers
        self._answer_headers = answer_headers
        self._route = route
        self._decode = route.decode
        self._ref: HandoffRef | None = None
        policy = gateway.policy.gateway
        self._flow = f.Flow(policy.resumes if policy.resume and parsed.stream else 0)
        self._trail: Trail | None = None
        self._resumed: Resumed | None = None
        self._why_not: str | None = None  # why nothing is kept to go on from
        self._times = Timeline(arrival_s)
        self._calls: dict[str, Call] = {}
        self._work_on: dict[str, tuple[str, Work]] = {}
        self._status: dict[str, int] = {}
        self._headers: dict[str, list[Header]] = {}
        self._bodies: dict[str, list[bytes]] = {"prefill": [], "decode": []}
        self._sizes_bytes = {"prefill": 0, "decode": 0}
        self._sse: SseObserver | None = None
        self._first = b""
        self._whole = False
        self._slow = False
        self._over = False
        self._left = False  # the client went with its whole answer
        self._last = b""  # held back to be sent with the end of the answer
        self.prefill_deadline_s = FOREVER
        self.decode_deadline_s = FOREVER
        self.record = RequestRecord(
            request_id=request_id,
            at_s=time.time(),
            endpoint=parsed.endpoint,
            model=parsed.model,
            route="disaggregated" if isinstance(route, Disaggregated) else "local",
            why=decision.reason,
            prefill=route.prefill.name if isinstance(route, Disaggregated) else None,
            decode=route.decode.name,
            stream=parsed.stream,
            prompt_tokens_estimate=parsed.prompt_tokens,
            prompt_tokens_by=parsed.tokens_by,
        )

    @_contained
    def begin(self) -> None:
        """Start: mint the handoff if there is one, make the first calls."""
        route = self._route
        if isinstance(route, Disaggregated):
            fleet = self._gateway.fleet
            self._ref = self._gateway.mint(route.prefill, route.decode)
            self._gateway.ledger.open(self._ref.handoff_id)
            self._ref = replace(self._ref, endpoints=fleet.endpoints(route.prefill.name))
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
                self.record.status = status
                lines = self._lines([(b"content-type", b"application/json")])
                self._client.answer(status, error_body(status, message, code=code), lines)
        finally:
            self._finish(f.Finish("broken" if started else "error"))

    # What happens

    @_contained
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

    @_contained
    def close(self) -> None:
        """The gateway closes: end what still runs; nothing will be heard of it any more."""
        if self._left:
            self._end_left()
        else:
            self._do(self._flow.on(f.ClientGone()))

    @_contained
    def client_slow(self, slow: bool) -> None:
        """Stop or go on reading the worker's answer."""
        call = self._calls.get("decode")
        self._slow = slow
        self._touch(time.monotonic())
        if call is not None and slow:
            call.pause()
        elif call is not None:
            call.resume()

    @_contained
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
            key, bound_s = "first_byte_s", policy.first_byte_s
            detail = f"no answer within {bound_s:g} s (policy key gateway.{key})"
            self._do(self._flow.on(f.DecodeFailed("timeout", detail)))

    @_contained
    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """The head of a worker's answer came."""
        self._status[call.side] = status
        self._headers[call.side] = headers
        if call.side == "decode":
            kind = header_value(headers, b"content-type") or b""
            if status == 200 and kind.startswith(b"text/event-stream"):
                self._sse = SseObserver()
            elif status == 200 and self._flow.state is f.State.RESUME:
                call.cancel()
                self._do(self._flow.on(f.DecodeFailed("garbage", "its answer is no stream")))

    @_contained
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
            if self._broke_inside(call, data):
                return
            data = self._outgoing(data)
            if self._went_astray(call) or not data:
                return
            if call.last:
                self._last = data
            else:
                self._client.write(data)
        elif self._sse is not None and (problem := failed_at_once(data)) is not None:
            call.cancel()
            self._do(self._flow.on(f.DecodeFailed("error_event", problem)))
        else:
            self._first = data
            self._do(self._flow.on(f.DecodeStarted()))

    def _chunk_taker(self, send: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """Return what forwards one chunk of whole events as it came: the hot path of streams."""
        sse, stamp, trail = self._sse, self._times.stamp, self._trail
        if sse is None:
            raise LocalProtocolError("only streams have a fast path")
        keep = sse.keep

        def take(data: bytes) -> None:
            if sse.part:
                self.call_data(self._calls["decode"], data[data.find(b"\r\n") + 2 : -2])
                return
            send(data)
            if OUTPUT in data or OUTPUT_SPACED in data:
                stamp(monotonic())
            keep(data)

        if trail is None:
            return take
        strip = trail.take

        def take_ids(data: bytes) -> None:
            if sse.part or b'"token_ids":[' not in data:
                self.call_data(self._calls["decode"], data[data.find(b"\r\n") + 2 : -2])
                return
            data = strip(data[data.find(b"\r\n") + 2 : -2])
            send(b"%x\r\n%b\r\n" % (len(data), data))
            stamp(monotonic())
            keep(data)

        return take_ids

    def _outgoing(self, data: bytes) -> bytes:
        """Return whole events as the client gets them."""
        if self._resumed is not None:
            return self._resumed.take(data)
        return data if self._trail is None else self._trail.take(data)

    def _broke_inside(self, call: Call, data: bytes) -> bool:
        """Whether the worker tells in its stream that it failed, and the stream may go on."""
        if self._trail is None or (problem := failed_at_once(data)) is None:
            return False
        call.cancel()
        self._do(self._flow.on(f.DecodeFailed("error_event", problem)))
        return True

    def _went_astray(self, call: Call) -> bool:
        """Whether the next worker contradicts what the client has."""
        if self._resumed is None or self._resumed.problem is None:
            return False
        call.cancel()
        self.record.not_resumed = self._resumed.problem
        self._do(self._flow.on(f.NotResumable(self._resumed.problem)))
        return True

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

    @_contained
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

    @_contained
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
        self._bodies["prefill"] = []
        self._succeeded("prefill")
        self.surroundings.read(self.record, self.record.prefill)
        self._do(self._flow.on(f.PrefillAnswered(published)))

    def _relays(self, route: Disaggregated) -> bool:
        return self._gateway.fleet.family(route.prefill, route.decode) == "relay"

    def _stream_end(self, sse: SseObserver) -> None:
        if not sse.ended and not self._left:
            detail = "the worker ended the stream before its end mark"
            self._do(self._flow.on(f.DecodeFailed("truncated", detail)))
            return
        if sse.held:
            self._last += sse.rest()
        self._succeeded("decode")
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
        self._succeeded("decode")
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
        policy = self._gateway.policy.gateway
        now_s = self._times.prefill_start_s = time.monotonic()
        self.prefill_deadline_s = now_s + policy.prefill_s
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
        body = self._with_trail(dialect, body)
        self._send("decode", self._decode, encode(body), self._decode_work(0))

    def _decode_work(self, prompt_tokens: int) -> Work:
        """Return what this request asks of a decode worker that reads ``prompt_tokens`` itself."""
        bound = self._parsed.max_output_tokens
        return Work(prompt_tokens, self._parsed.prompt_tokens, expected_output(bound))

    def _send_local(self, command: f.Command) -> None:
        whole = self._decode.whole
        if isinstance(command, f.SendLocal) and (command.elsewhere or not whole):
            other = self._gateway.another_decode(self.record.request_id, self._parsed, self._decode)
            if other is None and not (command.else_same and whole):
                self._do(self._flow.on(f.NoWorker()))
                return
            self._decode = other or self._decode
            self.record.decode = self._decode.name
        parsed = self._parsed
        dialect = self._gateway.fleet.dialects.get(self._decode.engine)
        body = parsed.body if dialect is None else dialect.local_body(parsed.body)
        body = self._with_trail(dialect, body)
        raw = parsed.raw if body is parsed.body else encode(body)
        self._send("decode", self._decode, raw, self._decode_work(parsed.prompt_tokens))

    def _with_trail(self, dialect: Dialect | None, body: Body) -> Body:
        """Return the body of a decode call that can go on elsewhere, if this request can."""
        parsed, policy = self._parsed, self._gateway.policy.gateway
        self._trail = None
        if not parsed.stream or not policy.resume or not policy.resumes:
            return body
        if not isinstance(dialect, ResumingDialect):
            self._why_not = f"{self._decode.engine} workers cannot go on with an answer"
        elif parsed.opaque is not None:
            self._why_not = parsed.opaque
        elif parsed.prompt_tokens > MAX_PROMPT_TOKENS:
            self._why_not = f"a prompt of more than {MAX_PROMPT_TOKENS} tokens"
        else:
            self._why_not = dialect.unresumable(parsed.body, chat=parsed.endpoint == CHAT)
            if self._why_not is None:
                self._trail = Trail()
                return dialect.resumable_body(body)
        return body

    def _resume(self, _: f.Command) -> None:
        if self._last:
            self._client.write(self._last)
            self._last = b""
        event = self._resume_or_why_not()
        if event is not None:
            if isinstance(event, f.NotResumable):
                self.record.not_resumed = event.why
            self._do(self._flow.on(event))

    def _resume_or_why_not(self) -> f.Event | None:
        """Call another worker, or return what keeps the answer from going on."""
        trail, parsed = self._trail, self._parsed
        if trail is None:
            return f.NotResumable(self._why_not or "its events were not looked at")
        said = self._sse.end() if self._sse is not None else StreamEnd()
        if said.finish is not None:
            options = parsed.body.get("stream_options")
            usage = isinstance(options, dict) and bool(options.get("include_usage"))
            usage = usage and said.output_tokens is None
            self._last = closing(trail, usage=usage, chat=parsed.endpoint == CHAT)
            return f.AllSaid()
        if (why := trail.problem()) is not None:
            return f.NotResumable(why)
        request_id = self.record.request_id
        other = self._gateway.another_decode(request_id, parsed, self._decode)
        if other is None or not other.whole or other.engine != self._decode.engine:
            return f.NotResumable("there is no other worker that can go on")
        dialect = self._gateway.fleet.dialects.get(other.engine)
        if not isinstance(dialect, ResumingDialect):
            return f.NotResumable(f"{other.engine} workers cannot go on with an answer")
        if self._resumed is not None and self._resumed.owes:
            return f.NotResumable("the worker that went on failed before it had caught up")
        owed = trail.cut()
        ids = trail.ids.tolist()
        chat = parsed.endpoint == CHAT
        try:
            body = dialect.resume_body(parsed.body, trail.prompt, ids, chat=chat)
        except LocalProtocolError as exc:
            return f.NotResumable(str(exc))
        self._resumed = Resumed(trail, owed)
        self._decode = other
        self.record.decode = other.name
        tokens = len(trail.prompt) + len(ids)
        self._send("decode", other, encode(body), self._decode_work(tokens))
        return None

    def _continue_answer(self, _: f.Command) -> None:
        on = self._work_on.get("decode")
        if on is not None:
            self._work_on["decode"] = (on[0], self._gateway.fleet.prompt_read(*on))
        call, data = self._calls["decode"], self._outgoing(self._first)
        self._first = b""
        if self._went_astray(call):
            return
        if call.last:
            self._last = data
        elif data:
            self._client.write(data)
        self._touch(time.monotonic())
        if self._slow:
            call.pause()

    def _send(self, side: str, worker: Worker, body: bytes, work: Work) -> None:
        gateway = self._gateway
        if side == "decode":
            self._sse = None
            self.decode_deadline_s = time.monotonic() + gateway.policy.gateway.first_byte_s
        self._bodies[side] = []
        self._sizes_bytes[side] = 0
        self.surroundings.sent(self.record, self._times, side, worker, gateway.fleet.view())
        gateway.fleet.begin(worker.name, work)
        self._work_on[side] = (worker.name, work)
        pool = gateway.pools[worker.name]
        path = self._parsed.endpoint.encode("ascii")
        call = Call(side, post(path, pool.host_header, self._shared, body), self)
        self._calls[side] = call
        pool.submit(call)

    def _leave(self, side: str) -> None:
        """The worker of ``side`` has no more work of this request."""
        on = self._work_on.pop(side, None)
        if on is not None:
            self._gateway.fleet.end(*on)
        self._calls.pop(side, None)

    def _succeeded(self, side: str) -> None:
        on = self._work_on.get(side)
        if on is not None:
            self._gateway.fleet.succeeded(on[0])
        self._leave(side)

    def _start_answer(self, _: f.Command) -> None:
        on = self._work_on.get("decode")
        if on is not None:
            self._work_on["decode"] = (on[0], self._gateway.fleet.prompt_read(*on))
        self.record.status = 200
        self.surroundings.answering(self.record)
        lines = self._lines(self._headers["decode"])
        if not self._whole and self._sse is not None:
            self._first = self._outgoing(self._first)
        if self._whole:
            self._client.answer(200, self._first, lines)
        else:
            self._client.start(200, lines, self._first)
            self._touch(time.monotonic())
            send = self._client.raw_writer() if self._sse is not None else None
            if send is not None:
                self._calls["decode"].pass_chunks(self._chunk_taker(send))
        self._first = b""

    def _lines(self, headers: list[Header]) -> bytes:
        return forwarded(headers, NOT_DOWNSTREAM) + self._answer_headers

    def _touch(self, now_s: float) -> None:
        policy = self._gateway.policy.gateway
        if self._flow.state is f.State.STREAM:
            self.decode_deadline_s = now_s + policy.idle_s

    def _complete_answer(self, _: f.Command) -> None:
        if not self._whole:
            self._client.complete(self._last)

    def _break_answer(self, command: f.Command) -> None:
        last = b""
        if self._sse is not None and isinstance(command, f.BreakAnswer):
            error = error_body(502, command.message, code="upstream_broke_off")
            last = b"data: %b\n\n" % error
        self._client.break_off(self._last + last)

    def _answer_verbatim(self, command: f.Command) -> None:
        side = command.side if isinstance(command, f.AnswerVerbatim) else "decode"
        status, body = self._status[side], b"".join(self._bodies[side])
        self.record.status = status
        lines = self._lines(self._headers[side])
        if not body.lstrip().startswith(b"{"):
            body = error_body(status, f"the worker answered {status} without saying why")
            lines = self._lines([(b"content-type", b"application/json")])
        self._client.answer(status, body, lines)

    def _answer_error(self, command: f.Command) -> None:
        if not isinstance(command, f.AnswerError):
            return
        self.record.status = command.status
        lines = self._lines([(b"content-type", b"application/json")])
        if command.status == 503:
            lines += b"retry-after: 1\r\n"
        body = error_body(command.status, command.message, code=command.code)
        self._client.answer(command.status, body, lines)

    def _cancel(self, command: f.Command) -> None:
        side = command.side if isinstance(command, f.Cancel) else "decode"
        call = self._calls.get(side)
        if call is not None and not call.ended:
            call.cancel()
        if side == "prefill":
            self.prefill_deadline_s = FOREVER
        self._leave(side)

    def _note(self, command: f.Command) -> None:
        if not isinstance(command, f.Note):
            return
        on = self._work_on.get(command.side)
        worker = on[0] if on is not None else self.record.decode
        self.record.failures.append(
            FailureRecord(worker, command.side, command.kind, command.detail[:300])
        )
        self._gateway.worker_failed(worker, command.side, command.kind, command.detail)

    def _finish(self, command: f.Command) -> None:
        if self._over:
            return
        self._over = True
        outcome = command.outcome if isinstance(command, f.Finish) else "ok"
        for side in list(self._work_on):
            self._leave(side)
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
            if self._trail is not None and self._resumed is not None:
                record.prompt_tokens = len(self._trail.prompt)
                record.output_tokens = len(self._trail.ids)
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
