"""The gateway's centre: holds the parts together and routes each request to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.gateway import admin, endpoints
from disagg_plugins.gateway.client_connection import JSON, ClientConnection, Request
from disagg_plugins.gateway.entrance import Entrance, Ways
from disagg_plugins.gateway.explanations import Explanations
from disagg_plugins.gateway.fleet import FleetState
from disagg_plugins.gateway.fleet_keeper import FleetKeeper
from disagg_plugins.gateway.intake import Intake
from disagg_plugins.gateway.openai import CHAT, COMPLETIONS
from disagg_plugins.gateway.prompts import Prompts
from disagg_plugins.gateway.refusals import error_body
from disagg_plugins.gateway.retry_budget import RetryBudget
from disagg_plugins.gateway.slow_workers import SlowWorkers
from disagg_plugins.telemetry.ledger import HandoffLedger
from disagg_plugins.telemetry.metrics import Metrics
from disagg_plugins.telemetry.records import FailureRecord, RecordView
from disagg_plugins.telemetry.reports import report_key
from disagg_plugins.types import Decision, Disaggregated, FleetView, RequestProfile, Worker

if TYPE_CHECKING:
    from disagg_plugins.gateway.counting import WaitsForCount
    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.gateway.exchange import Exchange
    from disagg_plugins.gateway.explanations import Explanation
    from disagg_plugins.gateway.observer import Observer
    from disagg_plugins.gateway.parts import Parts
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.timeline import Timeline
    from disagg_plugins.policy import Policy
    from disagg_plugins.scheduling.trace import Trace
    from disagg_plugins.telemetry.records import RequestRecord

log = logging.getLogger(__name__)

RECENT = 1000
"""Requests over which the share of real splits is shown."""

FLUSH_S = 0.5
"""How often records are written."""

POOL_SWEEP_S = 5.0

GONE = ("refused", "unreachable")
"""Failures of a worker whose process, and its cache with it, has most likely ended."""

CLOSING_S = 1.0
"""How long the end waits for sockets that were told to close."""

RECORDS_S = 5.0
"""How long the end waits for the disk that takes the last records."""


Handler = Callable[["Gateway", Request, ClientConnection], None]


class Gateway:
    """One gateway. Everything runs on one event loop; nothing here blocks."""

    def __init__(self, policy: Policy, parts: Parts, tasks: asyncio.TaskGroup) -> None:
        self.policy = policy
        self.mint = parts.mint
        self.plugin_failures = parts.plugin_failures
        self.report_key = report_key(parts.secret)
        self.metrics = Metrics()
        self.signatures = admin.Signatures(parts.secret)
        self.fleet = FleetState(
            (),
            parts.dialects,
            model=policy.model,
            unhealthy_after=policy.gateway.unhealthy_after,
        )
        self.slow = SlowWorkers(self.fleet, self.metrics, policy.gateway.slow_factor)
        self._tasks = tasks
        self._helpers: set[asyncio.Task[None]] = set()
        self._lasting: list[asyncio.Task[None]] = []
        self.pools: dict[str, WorkerPool] = {}
        self.prompts = Prompts(policy, parts.counter)
        self._keeper = FleetKeeper(
            policy,
            self.fleet,
            self.pools,
            self._spawn,
            ask=parts.rebalance,
            watch=parts.watch,
            joined=self.prompts.joined,
            gone=self._worker_gone,
        )
        self.members = self._keeper.members
        self.prober = self._keeper.prober
        self.rebalancer = self._keeper.rebalancer
        self.ledger = HandoffLedger(
            self.metrics, wait_s=policy.telemetry.report_wait_s, settle=self._settle
        )
        self.connections: set[ClientConnection] = set()
        self.active: set[Exchange] = set()
        self.explanations = Explanations()
        self.retries = RetryBudget(policy.gateway.retry_share, policy.gateway.retries_per_s)
        self.once: set[str] = set()  # requests that no second worker is asked for, by id
        self.read_tokens: Counter[str] = Counter()  # prompt tokens read so far, by worker
        self.counting: set[WaitsForCount] = set()
        self.recent: deque[tuple[str, str, str]] = deque(maxlen=RECENT)
        self.draining = False
        self.began_s = time.monotonic()
        self.observer: Observer | None = None
        self.arm: str | None = None  # of a canary, whose arms are gateways by themselves
        self._changed = asyncio.Event()
        self._scheduler = parts.scheduler
        self.intake = Intake(self)
        ways = Ways(
            self.decide,
            self.intake.begin,
            self.intake.refuse_waiting,
            parts.scheduler.queue_score,
            self.fleet.view,
            self.changed,
        )
        self.entrance = Entrance(policy.scheduler, self.metrics, ways)
        self.fleet.on_freed = self.entrance.freed
        self._records = parts.records
        self._told_problems: set[str] = set()
        self._gauges()

    def _gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("disagg_requests_in_flight", "Requests in flight.", lambda: len(self.active))
        gauge("disagg_client_connections", "Open connections.", lambda: len(self.connections))
        gauge("disagg_handoffs_open", "Handoffs not settled.", lambda: len(self.ledger))
        gauge(
            "disagg_workers_healthy",
            "Workers that take requests.",
            lambda: sum(s.takes_work for s in self.fleet.states.values()),
        )
        gauge("disagg_role_changes", "Roles changed.", lambda: self.rebalancer.changes)

    def start(self) -> None:
        """Begin to probe the workers and to watch deadlines."""
        self._lasting = [
            self._tasks.create_task(self.prober.run()),
            self._tasks.create_task(self.watch()),
            self._tasks.create_task(self._guarded(self.prompts.events.run())),
        ]
        self._keeper.start()

    def _worker_gone(self, name: str) -> None:
        """A worker left the fleet: nothing is kept of it."""
        self.metrics.forget("disagg_failures", 0, name)
        self.slow.gone(name)
        self.prompts.left(name)
        self.read_tokens.pop(name, None)

    def stop(self) -> None:
        """Cancel everything that runs by itself."""
        for task in self.running():
            task.cancel()
        self.prompts.close()

    def running(self) -> list[asyncio.Task[None]]:
        """Return every task that is not done."""
        return [t for t in (*self._lasting, *self.prober.tasks, *self._helpers) if not t.done()]

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        helper = self._tasks.create_task(self._guarded(work))
        self._helpers.add(helper)
        helper.add_done_callback(self._helpers.discard)

    async def _guarded(self, work: Coroutine[object, object, None]) -> None:
        # One failed helper must not end the group that all requests share.
        try:
            await work
        except Exception:
            log.exception("a task of the gateway failed")

    # Requests

    def handle(self, request: Request, client: ClientConnection) -> None:
        """Answer one request; whatever goes wrong, the client hears of it."""
        path = request.path.partition(b"?")[0]
        route = _ROUTES.get(path) or admin.route(path)
        if route is None:
            shown = path[:100].decode("ascii", "replace")
            self.refuse(client, 404, f"there is no {shown} here", code="not_found")
            return
        methods, handler = route
        if request.method == b"OPTIONS":
            client.answer(204, b"", b"allow: %b, OPTIONS\r\n" % b", ".join(methods))
        elif request.method not in methods:
            allowed = b", ".join(methods)
            message = f"the method for this path is {methods[0].decode()}"
            body = error_body(405, message, code="method_not_allowed")
            client.answer(405, body, JSON + b"allow: %b\r\n" % allowed)
        else:
            try:
                handler(self, request, client)
            except Exception:
                log.exception("a request could not be handled")
                self.refuse(client, 500, "the gateway failed; its log says why", code="internal")

    def refuse(
        self,
        client: Client,
        status: int,
        message: str,
        *,
        code: str | None = None,
        lines: bytes = b"",
    ) -> None:
        """Answer with an error of the gateway's own."""
        self.metrics.count("disagg_client_errors", (str(status),))
        client.answer(status, error_body(status, message, code=code), JSON + lines)

    def decide(self, explanation: Explanation, body: Body) -> Decision:
        """Return the route of a request, and keep why.

        Raises:
            NoCapacityError: No worker can take it.
        """
        profile, trace = explanation.profile, explanation.trace
        view = self.fleet.view_for(profile.model)
        decision = self._scheduler.decide(profile, view, trace)
        route = decision.route
        if isinstance(route, Disaggregated) and route.prefill.engine != route.decode.engine:
            why = self.fleet.dialects[route.decode.engine].unsplittable_across(body)
            if why is not None:
                decision = self._decide_alike(profile, view, why, trace)
        if decision.problem:
            self._tell(decision.problem)
        explanation.decision = decision
        return decision

    def _decide_alike(
        self, profile: RequestProfile, view: FleetView, why: str, trace: Trace
    ) -> Decision:
        """Return the route of a request that two engines cannot share: ``why``."""
        alike = self.fleet.alike(view, why)
        with contextlib.suppress(NoCapacityError):
            decision = self._scheduler.decide(replace(profile, admitted=True), alike, trace)
            if isinstance(decision.route, Disaggregated):
                return decision
        whole = replace(profile, unsplittable=why, admitted=True)
        return self._scheduler.decide(whole, view, trace)

    def _tell(self, problem: str) -> None:
        if problem not in self._told_problems and len(self._told_problems) < RECENT:
            self._told_problems.add(problem)
            log.warning("requests are not split: %s", problem)

    def another_decode(
        self, profile: RequestProfile, failed: Worker, tried: Sequence[str] | None = None
    ) -> Worker | None:
        """Return a decode worker other than ``failed``, or None.

        Args:
            profile: The request.
            failed: Who failed at it.
            tried: Only a worker can be returned that could go on with an answer which ``failed``
                began, and that is none of these; None: the answer begins anew.
        """
        if profile.request_id in self.once:
            return None
        again = replace(
            profile, unsplittable=f"a retry after worker {failed.name} failed", admitted=True
        )
        without = [failed.name]
        if tried is not None:
            others = (w for w in self.fleet.workers if not w.whole or w.engine != failed.engine)
            without += [*tried, *(w.name for w in others)]
        try:
            view = self.fleet.view_for(profile.model, without=without)
            explanation = self.explanations.of(profile.request_id)
            trace = None if explanation is None else explanation.trace
            decision = self._scheduler.decide(again, view, trace)
        except NoCapacityError:
            return None
        other = decision.route.decode
        return None if other.name in without else other

    def may_retry(self, record: RequestRecord) -> bool:
        """Return whether one more retry is within the budget; the record tells where not."""
        policy = self.policy.gateway
        if record.request_id in self.once:
            return False
        if self.retries.take(time.monotonic()):
            return True
        self.metrics.count("disagg_retries_refused")
        detail = (
            f"more than {policy.retry_share:g} of the requests and {policy.retries_per_s:g} a "
            "second were retried of late (policy keys gateway.retry_share, gateway.retries_per_s)"
        )
        record.failures.append(FailureRecord("", "gateway", "retry_budget", detail))
        return False

    def worker_failed(self, worker: str, side: str, kind: str, detail: str) -> None:
        """Count a failed call and let the worker's health know."""
        label = worker if worker in self.fleet.states else "gone"  # no label outlives its worker
        self.metrics.count("disagg_failures", (label, side, kind))
        log.warning("worker %s, %s: %s: %s", worker, side, kind, detail)
        self.fleet.failed(worker, kind, detail)
        self.entrance.freed(worker)
        if kind in GONE:
            self.prompts.forget(worker)

    # Ends

    def finished(self, exchange: Exchange, times: Timeline, ref: HandoffRef | None) -> None:
        """A request is over: count it, and record it once the reports are there."""
        self.active.discard(exchange)
        self.entrance.ended(exchange)
        self._changed.set()
        now_s = time.monotonic()
        record = exchange.record
        try:
            times.fill(record, self.metrics, now_s)
            self.rebalancer.ended(now_s, record)
            self.slow.ended(now_s, record)
            count = self.metrics.count
            count("disagg_requests", (record.route, record.outcome, str(record.status)))
            count("disagg_decisions", (record.route, _reason_label(record.why)))
            if record.hedge is not None:
                count("disagg_hedges", (record.hedge,))
            if record.resumes:
                count("disagg_resumed", (), record.resumes)
            if record.retries:
                count("disagg_retries", (), record.retries)
        finally:
            if ref is None:
                self._settle(record)
            else:
                self.ledger.close(ref.handoff_id, record, now_s)

    def _settle(self, record: RequestRecord) -> None:
        if self.observer is not None:
            self.observer.settled(record)
        self.recent.append((record.route, record.split, _reason_label(record.why)))
        if record.outcome == "ok":
            self.fleet.wrote(record)
        if self._records is None:
            record.summarise_gaps()  # the last requests are remembered, not each of their gaps
        elif not self._records.add(record):
            self.metrics.count("disagg_records_dropped")
        if not self._scheduler.wants_ends:
            return
        try:
            self._scheduler.request_ended(RecordView(record))
        except Exception:  # whatever a plugin does, the next request is served
            log.exception("plugins could not be told of a request's end")

    # Time

    def tick_s(self) -> float:
        """Return how often deadlines are looked at: a quarter of the shortest, within bounds."""
        policy = self.policy.gateway
        shortest_s = min(policy.prefill_s, policy.first_byte_s, policy.idle_s, policy.client_idle_s)
        shortest_s = min(shortest_s, self.policy.scheduler.queue.max_wait_s)
        shortest_s = min(shortest_s, policy.hedge_s or shortest_s, policy.request_s or shortest_s)
        return min(0.25, max(0.02, min(shortest_s, self.policy.telemetry.report_wait_s) / 4))

    async def watch(self) -> None:
        """Enforce every deadline until cancelled.

        One coarse clock for all instead of timers a request: a timer set and cancelled costs more
        than a request's share of this loop.
        """
        tick_s = self.tick_s()
        flush_at_s = sweep_at_s = 0.0
        while True:
            await asyncio.sleep(tick_s)
            now_s = time.monotonic()
            self._enforce(now_s)
            _safely(functools.partial(self.members.sweep, now_s))
            _safely(functools.partial(self.rebalancer.tick, now_s))
            if now_s >= sweep_at_s:
                sweep_at_s = now_s + POOL_SWEEP_S
                for pool in list(self.pools.values()):
                    _safely(pool.sweep)
                _safely(functools.partial(self.prompts.sweep, now_s))
            if self._records is not None and now_s >= flush_at_s:
                flush_at_s = now_s + FLUSH_S
                _safely(self._records.flush_soon)  # it must not wait: the disk may stall

    def _enforce(self, now_s: float) -> None:
        _safely(functools.partial(self.entrance.tick, now_s))
        for exchange in [e for e in self.active if e.deadlines.passed(now_s)]:
            _safely(functools.partial(exchange.expire, now_s))
        for client in [c for c in self.connections if now_s > c.deadline_s]:
            if not _safely(client.expire):
                client.transport.abort()
        _safely(functools.partial(self.ledger.sweep, now_s))

    def left(self, client: ClientConnection) -> None:
        """A client connection is closed."""
        self.connections.discard(client)
        self.changed()

    def changed(self) -> None:
        """Something that the end waits for may be over."""
        self._changed.set()

    async def _until(self, done: Callable[[], bool], end_s: float) -> None:
        """Wait until ``done``, at most until ``end_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, end_s - time.monotonic())):
                while not done():
                    self._changed.clear()
                    await self._changed.wait()

    async def drain(self) -> None:
        """Let open requests end, within ``drain_s``; then close everything."""
        self.draining = True
        self._keeper.close()
        for task in self._lasting[:1]:
            task.cancel()  # no more probes
        await asyncio.sleep(0.01)  # connections may have been accepted that are not made yet
        for client in list(self.connections):
            client.close()
        _safely(self.entrance.close)
        end_s = time.monotonic() + self.policy.gateway.drain_s
        await self._until(lambda: not self.active and not self.counting, end_s)
        for exchange in list(self.active):
            _safely(exchange.close)
        await self._until(lambda: not self.connections, time.monotonic() + CLOSING_S)
        for client in list(self.connections):
            client.transport.abort()
        await self._until(lambda: not self.connections, time.monotonic() + CLOSING_S)
        for pool in self.pools.values():
            _safely(pool.close)
        _safely(self.ledger.settle_all)
        if self._records is not None and not await asyncio.to_thread(
            self._records.close, RECORDS_S
        ):
            log.error("the last records were not written within %g s", RECORDS_S)


def _safely(do: Callable[[], object]) -> bool:
    """Do one of many things that must not suffer from each other; False when it failed."""
    try:
        do()
    except Exception:
        log.exception("the gateway failed at %r", do)
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _reason_label(why: str) -> str:
    """Return a reason without its numbers and values, so that it can be a label."""
    head = why.partition(":")[0]
    return " ".join("N" if any(c.isdigit() for c in word) else word for word in head.split())[:100]


def infer(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Route one completion or chat request."""
    gateway.intake.infer(request, client)


GET = (b"GET", b"HEAD")
POST = (b"POST",)
_ROUTES: Mapping[bytes, tuple[tuple[bytes, ...], Handler]] = {
    COMPLETIONS.encode(): (POST, infer),
    CHAT.encode(): (POST, infer),
    b"/v1/models": (GET, endpoints.models),
    b"/health": (GET, endpoints.health),
    b"/ready": (GET, endpoints.ready),
    b"/metrics": (GET, endpoints.metrics),
    b"/internal/status": (GET, endpoints.status),
    b"/internal/explain": (GET, endpoints.explain),
    b"/internal/reports": (POST, endpoints.reports),
}
