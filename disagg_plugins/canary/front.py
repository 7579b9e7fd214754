"""Two gateways behind one port: today's deployment and the one that is tried.

Each arm is a whole ``Gateway`` with its own fleet, policy, plugins and metrics, and knows nothing
of the other. The front stands before both: it has the connections, chooses an arm for each request,
and sees how it ended. What is not inference goes to the baseline, or is of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING

from disagg_plugins.canary import pages
from disagg_plugins.canary.arm_client import ArmClient
from disagg_plugins.canary.assignment import Assigner, Subject, prefix_of
from disagg_plugins.canary.copies import Copies
from disagg_plugins.canary.efficiency import scales
from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.canary.shadow import SHADOW_HEADER, Original, side_effects
from disagg_plugins.canary.traffic import Arrived, Traffic
from disagg_plugins.errors import RolloutRefused
from disagg_plugins.gateway import endpoints
from disagg_plugins.gateway.body import read_body
from disagg_plugins.gateway.entrance import tenant_of
from disagg_plugins.gateway.openai import CHAT, COMPLETIONS
from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.server import CLOSING_S
from disagg_plugins.gateway.sessions import session_of
from disagg_plugins.gateway.slo_classes import slo_class_of
from disagg_plugins.gateway.wire import header_value, request_id
from disagg_plugins.policy import SloClass
from disagg_plugins.telemetry.arm_metrics import ArmMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.canary.assignment import Assignment, Match, Sticky
    from disagg_plugins.canary.efficiency import Scale
    from disagg_plugins.canary.keeper import View
    from disagg_plugins.canary.lookout import Do, Lookout, Seen
    from disagg_plugins.canary.policy import CanaryPolicy
    from disagg_plugins.canary.rollout import Plan
    from disagg_plugins.gateway.body import Body
    from disagg_plugins.gateway.client_connection import ClientConnection, Request
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.policy import Policy
    from disagg_plugins.telemetry.metrics import Metrics
    from disagg_plugins.telemetry.records import RequestRecord

log = logging.getLogger(__name__)

INFERENCE = {COMPLETIONS.encode(): COMPLETIONS, CHAT.encode(): CHAT}
SHADOW = SHADOW_HEADER.encode()
NO_SLO = SloClass()
OVER = ("rolled_back", "aborted")
"""Phases after which nobody reaches the candidate, whatever rules and testers say."""

FRONT_METRICS = ("disagg_canary", "disagg_shadow")
"""Metrics with these beginnings are of no arm."""

TICK_S = 0.25
"""How often idle connections and copies are looked at."""


class ArmObserver:
    """Tells the front how the requests of one arm ended."""

    def __init__(self, front: Front, arm: Arm) -> None:
        self._front, self._arm = front, arm

    def began(self, name: str) -> None:
        """See ``Observer``."""
        self._front.traffic.began(name, self._arm)

    def refused(self, name: str, status: int) -> None:
        """See ``Observer``."""
        try:
            self._front.refused(self._arm, name, status)
        except Exception:  # evidence must not harm a request
            log.exception("a refusal could not be counted")

    def settled(self, record: RequestRecord) -> None:
        """See ``Observer``."""
        try:
            self._front.settled(self._arm, record)
        except Exception:  # as above
            log.exception("a request's end could not be counted")


class Front:
    """See the module. Everything runs on one event loop; nothing here blocks.

    Args:
        baseline: What runs today; its bounds on connections hold for all.
        candidate: What is tried.
        canary: The section of the baseline's policy.
        secret: The fleet's secret.
        authorization: What copies of requests carry as ``authorization``; None: nothing.
        name: This gateway's, as the rollout's memory knows it.
        plan: Of the rollout.
        tasks: What runs beside requests runs here.
        look: Makes the lookout, of what it asks for evidence and whom it tells its views.
    """

    def __init__(
        self,
        baseline: Gateway,
        candidate: Gateway,
        canary: CanaryPolicy,
        secret: bytes,
        *,
        authorization: str | None,
        name: str,
        plan: Plan,
        tasks: asyncio.TaskGroup,
        look: Callable[[Callable[[], Sequence[Seen]], Callable[[View], None]], Lookout],
    ) -> None:
        self.baseline, self.candidate, self.canary = baseline, candidate, canary
        self.arms: Mapping[Arm, Gateway] = {"baseline": baseline, "candidate": candidate}
        self.policy: Policy = baseline.policy
        self.metrics: Metrics = baseline.metrics
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self.name, self.plan = name, plan
        self._tasks = tasks
        self._changed = asyncio.Event()
        self._lasting: list[asyncio.Task[None]] = []
        self._helpers: set[asyncio.Task[None]] = set()
        grace_s = max(g.policy.telemetry.report_wait_s for g in self.arms.values()) + 1.0
        self.traffic = Traffic(canary.horizon_s, grace_s)
        self._secret = secret
        self._asked: dict[ClientConnection, str] = {}
        self._rules: tuple[Match, ...] = tuple(rule.match() for rule in canary.rules)
        self._sticky: Sticky = canary.sticky
        self._prefixes = canary.sticky == "prefix"
        self._scales = self._scales_now()
        self._rollout = -1
        self._assigner: Assigner
        self._serving: tuple[Arm, ...] = ("baseline",)
        self._weight = 0
        self._tokens = pages.Tokens(secret, canary.store.name)
        self.text = ArmMetrics(
            {arm: gateway.metrics for arm, gateway in self.arms.items()}, FRONT_METRICS
        )
        self.copies = Copies(self, secret, authorization) if canary.shadow is not None else None
        self.lookout = look(self._seen, self._looked)
        self._looked(self.lookout.view)
        for arm, gateway in self.arms.items():
            gateway.observer = ArmObserver(self, arm)
            gateway.arm = arm
        self._gauges()

    def _gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("disagg_canary_weight", "Percent for the candidate.", lambda: self._weight)
        gauge("disagg_client_connections", "Open connections.", lambda: len(self.connections))
        gauge(
            "disagg_canary_trouble",
            "1: the canary's memory cannot be used.",
            lambda: float(self.lookout.view.trouble is not None),
        )

    @property
    def tokens(self) -> pages.Tokens:
        """What opens the page to browsers elsewhere."""
        return self._tokens

    @property
    def serving(self) -> tuple[Arm, ...]:
        """The arms that take requests."""
        return self._serving

    # Requests

    def handle(self, request: Request, client: ClientConnection) -> None:
        """Answer one request; whatever goes wrong, the client hears of it."""
        path = request.path.partition(b"?")[0]
        endpoint = INFERENCE.get(path)
        try:
            if endpoint is not None and request.method == b"POST":
                self._infer(request, client, endpoint)
            elif not self._own(request, client, path):
                arm: Arm = "candidate" if pages.asks_candidate(request.path) else "baseline"
                self.arms[arm].handle(request, client)
        except Exception:
            log.exception("a request could not be handled")
            self.baseline.refuse(
                client, 500, "the gateway failed; its log says why", code="internal"
            )

    def _own(self, request: Request, client: ClientConnection, path: bytes) -> bool:
        """Answer what is of both arms; False: it is not."""
        get = request.method in (b"GET", b"HEAD")
        if path == b"/metrics" and get:
            client.answer(200, self.text.text(), endpoints.TEXT)
        elif path == b"/internal/reports" and request.method == b"POST":
            endpoints.reports(self.baseline, request, client, pick=self._reported)
        elif path == b"/internal/explain" and get:
            name = endpoints.explained(request)
            known = self.candidate.explanations.of(name) is not None
            (self.candidate if known else self.baseline).handle(request, client)
        elif path == b"/ready" and get and not self.baseline.fleet.ready()["decode"]:
            self.arms["candidate" if self._weight == 100 else "baseline"].handle(request, client)
        else:
            return pages.handle(self, request, client, path)
        return True

    def _reported(self, report: Mapping[str, object]) -> Gateway:
        """Return the arm that a worker's report is for."""
        other = self.candidate
        handoff = str(report.get("handoff_id"))
        ours = str(report["worker"]) in other.fleet.states or handoff in other.ledger
        return other if ours else self.baseline

    def _infer(self, request: Request, client: ClientConnection, endpoint: str) -> None:
        request.name = name = request_id(request.headers)
        try:
            body = request.read = read_body(request.body)
            subject = self._subject(request, name, body)
            self._check_model(subject.model)
            slo_class = slo_class_of(request.headers, self.policy.scheduler)
        except RequestError:
            self.baseline.intake.infer(request, client)  # it refuses with the same reason
            return
        assignment = self._assigner.assign(subject, self._weight, time.time(), self._serving)
        arm = assignment.arm
        request.arm = assignment
        self.metrics.count("disagg_canary_requests", (arm, assignment.by))
        if assignment.random:
            slo = self.policy.scheduler.slo_classes.get(slo_class or "", NO_SLO)
            stream = body.get("stream") is True
            now_s = time.monotonic()
            if name in self.traffic:  # a client's id, which another request of it has still
                request.name = name = request_id(())
            arrived = Arrived(arm, now_s, stream, slo.ttft_s, slo.tpot_s, self._scales[arm])
            self.traffic.enter(name, arrived)
            self._asked[client] = name
        if arm == "candidate":
            through: Client = client  # who asked for the candidate wants to hear how it fails
            if assignment.by != "override":
                through = ArmClient(client, elsewhere=lambda: self._elsewhere(request, client))
            self.candidate.intake.infer(request, through)
        elif self.copies is not None:
            self._with_copy(self.copies, request, client, endpoint, body, assignment)
        else:
            self.baseline.intake.infer(request, client)

    def _check_model(self, model: str | None) -> None:
        """Refuse a model that neither arm serves: its client's mistake, and no arm's failure."""
        if model is None or self.baseline.fleet.knows_model(model):
            return
        if not self.candidate.fleet.knows_model(model):
            raise RequestError(404, "neither arm serves the model", code="model_not_found")

    def _subject(self, request: Request, name: str, body: Body) -> Subject:
        headers = request.headers
        found = {
            key.decode("latin-1"): value.decode("latin-1")
            for key, value in headers
            if key in self._deciding
        }
        model, user = body.get("model"), body.get("user")
        user = user if isinstance(user, str) else None
        return Subject(
            name,
            model=model if isinstance(model, str) else None,
            tenant=tenant_of(headers, user),
            user=user,
            session=session_of(headers, body),
            prefix=_prefix(body) if self._prefixes else None,
            headers=found,
        )

    def _elsewhere(self, request: Request, client: ClientConnection) -> None:
        """The candidate failed before it sent anything: let the baseline answer.

        Not at once: whoever failed must be done with the connection first.
        """
        client.release()
        self.metrics.count("disagg_canary_fallbacks")
        request.arm = "baseline: the candidate failed"

        def begin() -> None:
            if client.request is request:  # else it went meanwhile
                try:
                    self.baseline.intake.infer(request, client)
                except Exception:
                    log.exception("a request could not be handled")
                    self.baseline.refuse(
                        client, 500, "the gateway failed; its log says why", code="internal"
                    )

        asyncio.get_running_loop().call_soon(begin)

    def _with_copy(
        self,
        copies: Copies,
        request: Request,
        client: ClientConnection,
        endpoint: str,
        body: Body,
        assignment: Assignment,
    ) -> None:
        tap = None
        try:
            original = Original(
                request_id=request.name,
                arm="baseline",
                body_bytes=len(request.body),
                prompt_tokens=copies.prompt_tokens(body, endpoint, len(request.body)),
                random=assignment.random or assignment.by == "only arm",
                effects=_effects(endpoint, body),
                is_copy=header_value(request.headers, SHADOW) is not None,
            )
            tap = copies.begin(original, request, body)
        except Exception:  # whatever a copy fails at, its original is answered
            log.exception("a copy could not be made")
        through = client if tap is None else ArmClient(client, tap=tap)
        self.baseline.intake.infer(request, through)

    # Ends

    def refused(self, arm: Arm, name: str, status: int) -> None:
        """A request of an arm was refused before it went to a worker."""
        if not self.draining:  # what the end of the gateway refuses is no fault of its arm
            self.traffic.refused(name, arm, status, time.monotonic())
        if self.copies is not None:
            self.copies.ended(arm, name, None)

    def settled(self, arm: Arm, record: RequestRecord) -> None:
        """A request of an arm is over."""
        record.arm = arm
        if record.outcome != "closed":  # as above
            self.traffic.settled(record, arm)
        if self.copies is not None:
            self.copies.ended(arm, record.request_id, record)

    def left(self, client: ClientConnection) -> None:
        """A client connection is closed."""
        self.connections.discard(client)
        name = self._asked.pop(client, None)
        if name is not None and not self.draining:
            self.traffic.left(name, time.monotonic())
        self._changed.set()

    # The rollout

    def _seen(self) -> list[Seen]:
        """Return what was seen since the last look."""
        self._scales = self._scales_now()  # workers join and leave
        epoch = self.traffic.epoch
        found: list[Seen] = [(epoch, o) for o in self.traffic.due(time.monotonic())]
        if self.copies is not None:
            found += self.copies.taken()
        return found

    def _scales_now(self) -> Mapping[Arm, Scale]:
        return scales({arm: gateway.fleet.workers for arm, gateway in self.arms.items()})

    def _looked(self, view: View) -> None:
        """Follow a view."""
        progress = view.progress
        self._weight = view.weight
        gone = progress.phase in OVER or (progress.active and view.weight == 0)
        self._serving = ("baseline",) if gone else ARMS
        if progress.rollout != self._rollout:
            log.info("canary: rollout %d is %s", progress.rollout, progress.phase)
            self._rollout = progress.rollout
            salt = f"{self.canary.store.name}/{progress.rollout}"
            self._assigner = Assigner(
                self._secret,
                salt,
                canary=self.canary.store.name,
                sticky=self._sticky,
                rules=self._rules,
            )
            self._deciding = frozenset(name.encode("latin-1") for name in self._assigner.headers)
            if self.copies is not None:
                self.copies.begin_rollout(salt)
        if progress.epoch != self.traffic.epoch:
            self.traffic.begin(progress.epoch)

    # Time

    async def watch(self) -> None:
        """Close idle connections and give copies up that are late, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            for client in [c for c in self.connections if now_s > c.deadline_s]:
                try:
                    client.expire()
                except Exception:
                    log.exception("a connection could not be closed in time")
                    client.abort()
            if self.copies is not None:
                try:
                    self.copies.sweep(now_s)
                except Exception:  # this task's end would end the gateway
                    log.exception("copies could not be given up in time")

    async def drain(self) -> None:
        """Let open requests end within the arms' ``drain_s``; then close everything."""
        self.draining = True
        for task in self._lasting[:1]:
            task.cancel()  # the last look comes when the last requests have ended
        if self.copies is not None:
            self.copies.close()
        await asyncio.sleep(0.01)  # connections may have been accepted that are not made yet
        for client in list(self.connections):
            client.close()
        try:
            await asyncio.gather(*(gateway.drain() for gateway in self.arms.values()))
        finally:
            await self.lookout.close()
            await self._until_closed(CLOSING_S)
            for client in list(self.connections):
                client.abort()

    async def _until_closed(self, within_s: float) -> None:
        """Wait until no connection is open any more, at most ``within_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.connections:
                    self._changed.clear()
                    await self._changed.wait()

    def start(self) -> None:
        """Begin to probe the workers of both arms, and to look at the evidence."""
        for gateway in self.arms.values():
            gateway.start()
        self._lasting = [
            self._tasks.create_task(self.lookout.run()),
            self._tasks.create_task(self.watch()),
        ]

    def stop(self) -> None:
        """Cancel everything that runs by itself."""
        for gateway in self.arms.values():
            gateway.stop()
        for task in (*self._lasting, *self._helpers):
            task.cancel()

    def running(self) -> list[asyncio.Task[None]]:
        """Return every task that is not done."""
        own = [t for t in (*self._lasting, *self._helpers) if not t.done()]
        return own + [task for gateway in self.arms.values() for task in gateway.running()]

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Begin something that answers a client later; it must not raise."""
        task = self._tasks.create_task(work)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    def check_command(self, do: Do) -> None:
        """Refuse to start what could only fail.

        Raises:
            RolloutRefused: The arms serve different models, or the candidate no worker that could
                answer.
        """
        if do != "start":
            return
        ours, theirs = (set(g.fleet.served_models()) for g in self.arms.values())
        if not self.candidate.fleet.ready()["decode"]:
            raise RolloutRefused("start", "the candidate has no healthy decode worker")
        if not ours & theirs:
            told = f"{', '.join(sorted(ours)) or 'none'} and {', '.join(sorted(theirs)) or 'none'}"
            raise RolloutRefused("start", f"the arms serve different models: {told}")


def _effects(endpoint: str, body: Body) -> str | None:
    try:
        return side_effects(endpoint, body)
    except RequestError:  # its worker may read what cannot be read here
        return "what cannot be read"


def _prefix(body: Body) -> str | None:
    try:
        return _prefix_of(body)
    except RequestError:  # its worker may read what cannot be read here
        return None


def _prefix_of(body: Body) -> str | None:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prefix_of(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt[:256]):
        return prefix_of(prompt)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    texts = [m.get("content") for m in messages[:8] if isinstance(m, Mapping)]
    return prefix_of("\n".join(text for text in texts if isinstance(text, str)))
