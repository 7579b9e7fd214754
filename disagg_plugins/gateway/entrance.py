"""From an accepted request to its beginning: what its tenant may have, and its wait for a slot.

A request that is to be split, while every prefill worker that fits is taken, waits here: it holds
no connection to any worker, and its client is watched. It is decided again, with the fleet as it is
then, when a slot may have come free; what it may be then is open: split, whole, or refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.gateway.flow import DEADLINE
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.wire import header_value
from disagg_plugins.scheduling.prefill_queue import PrefillQueue, Waiting
from disagg_plugins.scheduling.prefill_slots import has_slot
from disagg_plugins.scheduling.tenants import MAX_NAME_CHARS, Tenants
from disagg_plugins.scheduling.trace import Trace
from disagg_plugins.types import Decision, Disaggregated, FleetView, RequestProfile, Role

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body
    from disagg_plugins.gateway.explanations import Explanation
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.policy import SchedulerPolicy
    from disagg_plugins.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

TENANT_HEADER = b"x-disagg-tenant"

LOOK_AHEAD = 8
"""Requests that are tried for a free slot before it stays free: they may need another worker, for
their model or their decode workers. A decision takes some 50 microseconds."""

SHUTTING_DOWN = "the gateway is shutting down"
RETRY_ELSEWHERE_S = 5.0


def tenant_of(headers: Sequence[Header], user: str | None) -> str | None:
    """Return the tenant of a request: the header's, else ``user``; or None.

    Whoever can set the header is that tenant: a proxy before the gateway must set or drop it.
    """
    given = header_value(headers, TENANT_HEADER)
    name = user if given is None else given.decode("utf-8", "replace").strip()
    return name[:MAX_NAME_CHARS] if name else None


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that has not begun.

    Attributes:
        client: Who asked.
        parsed: What was asked.
        explanation: Its profile, and why it goes where it goes.
        shared_headers: Lines for all its calls to workers.
        answer_headers: Lines of its answer.
        explained: Whether the client asked for the explanation.
    """

    client: Client
    parsed: ParsedRequest
    explanation: Explanation
    shared_headers: bytes
    answer_headers: bytes
    explained: bool

    @property
    def profile(self) -> RequestProfile:
        """Return the request as the scheduler sees it."""
        return self.explanation.profile


class _Wait:
    """One wait: told when the client goes."""

    __slots__ = ("_entrance", "pending", "place")

    place: Waiting[_Wait]

    def __init__(self, entrance: Entrance, pending: Pending) -> None:
        self._entrance = entrance
        self.pending = pending

    def client_gone(self) -> None:
        """The client closed its connection."""
        self._entrance.left(self)

    def client_slow(self, slow: bool) -> None:
        """Nothing is sent yet."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What an entrance needs of its gateway.

    Attributes:
        decide: Returns the route of a request, and keeps why; raises ``NoCapacityError``.
        begin: Begins a request on its route, after a wait of so many seconds.
        refuse: Answers a request that waited with a refusal.
        score: Returns what plugins say of a request that begins to wait, 0 to 1.
        fleet: Returns the fleet as it is now.
        changed: Called when a request that waited is gone.
    """

    decide: Callable[[Explanation, Body], Decision]
    begin: Callable[[Pending, Decision, float], None]
    refuse: Callable[[Pending, NoCapacityError | RequestError], None]
    score: Callable[[RequestProfile], float]
    fleet: Callable[[], FleetView]
    changed: Callable[[], None]


class Entrance:
    """Admits requests and lets them wait. Everything runs on the gateway's loop."""

    def __init__(self, rules: SchedulerPolicy, metrics: Metrics, ways: Ways) -> None:
        self._rules = rules.queue
        self._metrics = metrics
        self._ways = ways
        self._tenants = Tenants(rules.tenants)
        self._limited = bool(rules.tenants)
        self._inside: dict[object, str | None] = {}
        self._queue: PrefillQueue[_Wait] = PrefillQueue(
            rules.queue.order, ageing_s=rules.queue.ageing_s
        )
        self._timed: set[_Wait] = set()  # those whose clients set a deadline
        self._pumping = False
        self._freed: set[str] = set()  # workers that may have a slot since the last look
        self._closed = False
        metrics.gauge(
            "disagg_requests_waiting",
            "Requests that wait for a prefill worker.",
            lambda: len(self._queue),
        )

    def __len__(self) -> int:
        return len(self._queue)

    def admit(self, pending: Pending) -> Decision | None:
        """Return the route of a request, to begin now; or None: it waits, and begins by itself.

        Who begins a request tells it: it ``began`` and ``ended``, or ``failed``.

        Raises:
            NoCapacityError: The request is refused.
        """
        tenant, tokens = pending.profile.tenant, pending.profile.prompt_tokens
        refusal = self._tenants.enter(tenant, tokens, pending.profile.arrival_s)
        if refusal is not None:
            raise NoCapacityError(
                refusal.reason, retry_after_s=refusal.retry_after_s, status=refusal.status
            )
        try:
            return self._route(pending)
        except BaseException:
            self.failed(pending)
            raise

    def began(self, request: object, tenant: str | None) -> None:
        """A request of ``tenant`` has begun, and is known as ``request`` from now on."""
        if self._limited:
            self._inside[request] = tenant

    def ended(self, request: object) -> None:
        """A request that began has ended; idempotent."""
        if request in self._inside:
            self._tenants.leave(self._inside.pop(request))

    def failed(self, pending: Pending) -> None:
        """A request that was admitted could not begin."""
        self._tenants.leave(pending.profile.tenant, pending.profile.prompt_tokens)

    def _route(self, pending: Pending) -> Decision | None:
        explanation = pending.explanation
        explanation.profile = profile = self._in_its_place(explanation.profile)
        decision: Decision | None = None
        most = 0 if self._closed else self._rules.max_waiting
        try:
            decision = self._ways.decide(explanation, pending.parsed.body)
        except NoCapacityError as exc:
            if not exc.taken or not most:
                raise
        route = None if decision is None else decision.route
        split = isinstance(route, Disaggregated)
        if decision is not None and (not most or not decision.taken):
            if not split or not self._queue:
                return decision  # by far the most usual way
        if len(self._queue) >= most:
            if split:
                return decision
            raise NoCapacityError(
                f"{len(self._queue)} requests wait for a prefill worker (policy key "
                "scheduler.queue.max_waiting)",
                retry_after_s=self._rules.max_wait_s,
            )
        # from now on what waits before it is nobody: it is decided again when its turn has come
        explanation.profile = replace(profile, admitted=True, queued_tokens=0, own_queued_tokens=0)
        wait = self._wait(pending)
        if isinstance(route, Disaggregated):  # others wait: it must not overtake them
            self._freed.add(route.prefill.name)
            self._pump()
            if wait.place.here:
                self._place(wait, monotonic())
        return None

    def _in_its_place(self, profile: RequestProfile) -> RequestProfile:
        """Return the profile with its tenant's priority, and with what waits before it."""
        rule = self._tenants.rule(profile.tenant)
        if rule is not None and rule.priority:
            profile = replace(profile, priority=profile.priority + rule.priority)
        if not self._queue:
            return profile
        return replace(
            profile,
            queued_tokens=self._queue.tokens_before(profile.priority),
            own_queued_tokens=0 if rule is None else self._queue.tokens_of(profile.tenant or ""),
        )

    def _wait(self, pending: Pending) -> _Wait:
        profile = pending.profile
        rule = self._tenants.rule(profile.tenant)
        wait = _Wait(self, pending)
        wait.place = self._queue.add(
            profile,
            wait,
            now_s=monotonic(),
            score=self._ways.score(profile),
            tenant="" if rule is None else profile.tenant or "",
            weight=1.0 if rule is None else rule.weight,
        )
        if profile.deadline_s is not None:
            self._timed.add(wait)
        pending.client.answering(wait)
        return wait

    # While requests wait

    def freed(self, worker: str) -> None:
        """A worker may have a slot, or has failed: look at who waits, soon."""
        if not self._queue:
            return
        self._freed.add(worker)
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def tick(self, now_s: float) -> None:
        """End waits that lasted too long, and look at the others."""
        if not self._queue:
            return
        for wait in [w for w in self._timed if now_s > (w.pending.profile.deadline_s or now_s)]:
            waited_s = now_s - wait.pending.profile.arrival_s
            problem = f"the deadline passed {waited_s:.2f} s after the request's arrival: it waited"
            self._refuse(wait, RequestError(504, f"{problem} for a worker", code=DEADLINE), "late")
        for place in self._queue.late(now_s - self._rules.max_wait_s):
            self._place(place.payload, now_s, late=True)
        self._freed.update(w.name for w in self._ways.fleet().serving(Role.PREFILL))
        self._pump(alone=not self._freed)

    def close(self) -> None:
        """Refuse everybody who waits: the gateway takes nothing new any more."""
        self._closed = True
        for place in self._queue.late(float("inf")):
            exc = NoCapacityError(SHUTTING_DOWN, retry_after_s=RETRY_ELSEWHERE_S)
            self._refuse(place.payload, exc, "closed")

    def left(self, wait: _Wait) -> None:
        """A client went while its request waited."""
        if self._queue.leave(wait.place):
            self._over(wait, "client_gone")
            self.failed(wait.pending)

    def _pump(self, *, alone: bool = False) -> None:
        """Give free slots to those whose turn it is.

        Args:
            alone: No prefill worker is there to wait for.
        """
        self._pumping = False
        freed, self._freed = self._freed, set()
        while self._queue and (alone or self._any_slot(freed)):
            now_s = monotonic()
            offers = self._queue.offers(now_s, LOOK_AHEAD)
            if not any(self._place(place.payload, now_s) for place in offers):
                return

    def _any_slot(self, names: set[str]) -> bool:
        """Return whether one of these workers has a slot; forget those that have none."""
        fleet, most = self._ways.fleet(), self._rules.prefills_per_worker
        while names:
            name = next(iter(names))
            worker = fleet.worker(name)
            if worker is not None and has_slot(worker, fleet, most):
                return True
            names.discard(name)
        return False

    def _place(self, wait: _Wait, now_s: float, *, late: bool = False) -> bool:
        """Decide again; True when the request waits no more."""
        pending = wait.pending
        try:
            pending.explanation.trace = Trace()  # of the last decision only: there may be many
            decision = self._ways.decide(pending.explanation, pending.parsed.body)
        except NoCapacityError as exc:
            if late or exc.status == 400:  # no wait makes it right
                return self._refuse(wait, exc, "refused")
            return False
        except Exception:
            log.exception("request %s could not be decided", pending.profile.request_id)
            return self._refuse(wait, _failed(), "refused")
        if decision.taken and not late:
            return False
        split = isinstance(decision.route, Disaggregated)
        if not (self._queue.serve if split else self._queue.leave)(wait.place):
            return False
        self._over(wait, "split" if split else "local")
        try:
            self._ways.begin(pending, decision, max(0.0, now_s - wait.place.since_s))
        except Exception:
            log.exception("request %s could not begin", pending.profile.request_id)
            self._tell(pending, _failed())
        return True

    def _refuse(self, wait: _Wait, exc: NoCapacityError | RequestError, end: str) -> bool:
        if not self._queue.leave(wait.place):
            return False
        self._over(wait, end)
        self.failed(wait.pending)
        self._tell(wait.pending, exc)
        return True

    def _tell(self, pending: Pending, exc: NoCapacityError | RequestError) -> None:
        """Answer a refusal; when that fails, it must not become the failure of another request.

        It may be the arrival of that one that made room here.
        """
        try:
            self._ways.refuse(pending, exc)
        except Exception:
            log.exception("request %s could not be refused", pending.profile.request_id)
            pending.client.break_off(b"")  # nobody will answer it any more

    def _over(self, wait: _Wait, end: str) -> None:
        self._timed.discard(wait)
        waited_s = max(0.0, monotonic() - wait.place.since_s)
        self._metrics.observe("disagg_queue_seconds", (end,), (waited_s,))
        self._ways.changed()


def _failed() -> NoCapacityError:
    return NoCapacityError("the gateway failed; its log says why", retry_after_s=1.0)
