"""The way of a request from its bytes to its route: read, counted, decided, begun or refused."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.gateway.client_connection import JSON, Request
from disagg_plugins.gateway.counting import WaitsForCount
from disagg_plugins.gateway.deadlines import timeout_of
from disagg_plugins.gateway.entrance import (
    RETRY_ELSEWHERE_S,
    SHUTTING_DOWN,
    Pending,
    tenant_of,
)
from disagg_plugins.gateway.exchange import Exchange
from disagg_plugins.gateway.openai import ParsedRequest, parse_request
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.sessions import session_of
from disagg_plugins.gateway.slo_classes import slo_class_of
from disagg_plugins.gateway.wire import header_value, request_id, upstream_headers
from disagg_plugins.policy import SloClass
from disagg_plugins.types import Decision, RequestProfile

if TYPE_CHECKING:
    from disagg_plugins.gateway.explanations import Explanation
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.token_counter import Counting, Ids

log = logging.getLogger(__name__)

NO_SLO = SloClass()

EXPLAIN = b"x-disagg-explain"
"""A request with this header is answered with one that tells what decided its route."""


class Intake:
    """Takes the requests of one gateway in. Everything runs on the gateway's loop."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def infer(self, request: Request, client: Client) -> None:
        """Route one completion or chat request; whatever goes wrong, the client hears of it."""
        name = request.name or request_id(request.headers)
        try:
            self._read(request, client, name)
        except Exception:
            self._failed(client, name)

    def _read(self, request: Request, client: Client, name: str) -> None:
        """Read a request, and route it once its prompt is counted."""
        gateway, now_s = self._gateway, time.monotonic()
        try:
            parsed = parse_request(
                request.path.partition(b"?")[0].decode("ascii"),
                request.body,
                chars_per_token=gateway.policy.scheduler.chars_per_token,
                body=request.read,
            )
            self._check_model(parsed)
            self._check_room()
            tenant = tenant_of(request.headers, parsed.tenant)
            session = session_of(request.headers, parsed.body)
            if session is not None or tenant != parsed.tenant:
                parsed = replace(parsed, session=session, tenant=tenant)
        except (RequestError, NoCapacityError) as exc:
            self._refused(client, exc, name, b"x-request-id: %b\r\n" % name.encode("ascii"))
            return
        counting = gateway.prompts.counting(parsed)
        ids = counting.ids() if counting is not None and counting.short else None
        if counting is not None and not counting.short:

            def go_on(ids: Ids | None) -> None:
                try:
                    self._route(request, client, parsed, ids, name, now_s)
                except Exception:
                    self._failed(client, name)

            if self._count(client, counting, go_on):
                return
        self._route(request, client, parsed, ids, name, now_s)

    def _count(
        self, client: Client, counting: Counting, go_on: Callable[[Ids | None], None]
    ) -> bool:
        """Begin to count a prompt on a thread; False when that cannot be done now."""
        counter = self._gateway.prompts.counter
        if counter is None:
            return False

        def ended(waits: WaitsForCount) -> None:
            self._gateway.counting.discard(waits)
            self._gateway.changed()

        waits = WaitsForCount(counter, go_on, ended)
        if not waits.begin(client, counting, self._gateway.policy.scheduler.tokenizer_s):
            return False
        self._gateway.counting.add(waits)
        return True

    def _route(
        self,
        request: Request,
        client: Client,
        parsed: ParsedRequest,
        ids: Ids | None,
        name: str,
        now_s: float,
    ) -> None:
        """Route a request whose prompt is counted, and begin it, or let it wait."""
        gateway = self._gateway
        lines = b"x-request-id: %b\r\n" % name.encode("ascii")
        explained = header_value(request.headers, EXPLAIN) is not None
        explanation: Explanation | None = None
        try:
            foreign = parsed.model not in (None, gateway.fleet.model())
            parsed = gateway.prompts.read(parsed, ids, foreign)
            slo_class = slo_class_of(request.headers, gateway.policy.scheduler)
            profile = self.profile(name, parsed, now_s, slo_class)
            timeout_s = timeout_of(request.headers, gateway.policy.gateway.request_s)
            if timeout_s is not None:
                profile = replace(profile, deadline_s=now_s + timeout_s)
            explanation = gateway.explanations.begin(profile)
            explanation.arm = request.arm
            shared = upstream_headers(request.headers, name)
            pending = Pending(client, parsed, explanation, shared, lines, explained)
            decision = gateway.entrance.admit(pending)
        except (RequestError, NoCapacityError) as exc:
            more = b""
            if explanation is not None and isinstance(exc, NoCapacityError):
                explanation.refused = exc.problem
                explanation.settle(len(self._gateway.fleet.workers))
                more = _explain_line(explanation) if explained else b""
            self._refused(client, exc, name, lines, more)
            return
        if decision is not None:
            self.begin(pending, decision)

    def refuse_waiting(self, pending: Pending, exc: NoCapacityError | RequestError) -> None:
        """Refuse a request that has waited."""
        pending.explanation.refused = str(exc)
        pending.explanation.settle(len(self._gateway.fleet.workers))
        more = _explain_line(pending.explanation) if pending.explained else b""
        name = pending.profile.request_id
        self._refused(pending.client, exc, name, pending.answer_headers, more)

    def begin(self, pending: Pending, decision: Decision, queue_s: float = 0.0) -> None:
        """Begin a request that was admitted."""
        gateway, profile, explanation = self._gateway, pending.profile, pending.explanation
        lines = pending.answer_headers
        try:
            gateway.prompts.routed(profile, decision.route)
            exchange = Exchange(
                gateway,
                pending.client,
                pending.parsed,
                decision,
                profile=profile,
                shared_headers=pending.shared_headers,
                answer_headers=lines + (_explain_line(explanation) if pending.explained else b""),
            )
        except BaseException:
            gateway.entrance.failed(pending)
            raise
        gateway.entrance.began(exchange, profile.tenant)
        exchange.record.queue_s = queue_s
        explanation.record = exchange.record
        explanation.settle(len(self._gateway.fleet.workers))
        gateway.active.add(exchange)
        if gateway.observer is not None:
            gateway.observer.began(profile.request_id)
        gateway.retries.request(time.monotonic())
        exchange.begin()

    def _failed(self, client: Client, name: str) -> None:
        """Answer a request that the gateway itself failed at; within ``except``."""
        log.exception("a request could not be handled")
        if self._gateway.observer is not None:
            self._gateway.observer.refused(name, 500)
        message = "the gateway failed; its log says why"
        self._gateway.refuse(client, 500, message, code="internal")

    def _refused(
        self,
        client: Client,
        exc: RequestError | NoCapacityError,
        name: str,
        lines: bytes,
        more: bytes = b"",
    ) -> None:
        if self._gateway.observer is not None:
            self._gateway.observer.refused(name, exc.status)
        if isinstance(exc, RequestError):
            self._gateway.metrics.count("disagg_client_errors", (str(exc.status),))
            client.answer(exc.status, exc.body(), JSON + lines)
            return
        lines += b"retry-after: %d\r\n" % max(1, math.ceil(exc.retry_after_s))
        lines += more
        self._gateway.refuse(client, exc.status, exc.problem, code="no_capacity", lines=lines)

    def _check_model(self, parsed: ParsedRequest) -> None:
        if parsed.model is not None and not self._gateway.fleet.knows_model(parsed.model):
            served = ", ".join(self._gateway.fleet.served_models())
            raise RequestError(
                404,
                f"the model {parsed.model[:200]!r} is not served here; served: {served}",
                code="model_not_found",
                param="model",
            )

    def _check_room(self) -> None:
        if self._gateway.draining:
            raise NoCapacityError(SHUTTING_DOWN, retry_after_s=RETRY_ELSEWHERE_S)
        gateway = self._gateway
        bound = gateway.policy.gateway.max_requests
        if len(gateway.active) + len(gateway.counting) + len(gateway.entrance) >= bound:
            raise NoCapacityError(
                f"{bound} requests are in flight (policy key gateway.max_requests)",
                retry_after_s=1.0,
            )

    def profile(
        self, name: str, parsed: ParsedRequest, now_s: float, slo_class: str | None = None
    ) -> RequestProfile:
        """Return what a scheduler may know of a request."""
        slo = self._gateway.policy.scheduler.slo_classes.get(slo_class or "", NO_SLO)
        why = parsed.opaque
        for dialect in self._gateway.fleet.dialects_here():
            why = why or dialect.unsplittable(parsed.body)
        return RequestProfile(
            request_id=name,
            endpoint=parsed.endpoint,
            model=parsed.model or self._gateway.fleet.model() or "",
            prompt_tokens=parsed.prompt_tokens,
            prompt_tokens_exact=parsed.tokens_by != "estimate",
            max_output_tokens=parsed.max_output_tokens,
            stream=parsed.stream,
            unsplittable=why,
            prefix_hashes=parsed.prefix_hashes,
            tenant=parsed.tenant,
            arrival_s=now_s,
            slo_class=slo_class,
            ttft_slo_s=slo.ttft_s,
            tpot_slo_s=slo.tpot_s,
            priority=slo.priority,
            session=parsed.session,
            tokens_by=parsed.tokens_by,
            cached_tokens=self._gateway.prompts.cached_tokens(parsed),
        )


def _explain_line(explanation: Explanation) -> bytes:
    return b"x-disagg-explain: %b\r\n" % explanation.header()
