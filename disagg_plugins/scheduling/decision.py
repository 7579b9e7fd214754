"""From a request profile and the fleet's state to a route: asks the scheduler hooks in order.

Pure and synchronous: it knows no clock, no socket and no event loop, so the gateway and the
simulator decide with the same code.
"""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import TYPE_CHECKING

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.policy import PICKERS, SPLIT_RULES
from disagg_plugins.scheduling.prefill_slots import has_slot
from disagg_plugins.scheduling.trace import CORE, Trace
from disagg_plugins.scheduling.weights import weights_of
from disagg_plugins.types import (
    Decision,
    Disaggregated,
    FleetView,
    Local,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from disagg_plugins.plugins import PluginHost
    from disagg_plugins.policy import Policy

RETRY_NO_WORKER_S = 1.0
"""Told to the client when the plugins' filters leave no decode worker."""

TIE = 1e-9
"""Scores closer than this are equal: weighted means differ in their last bits."""


class Scheduler:
    """Decides the route of each request. Thread-safe.

    Args:
        host: The plugins; told the policy here (``PluginHost.start``).
        policy: The whole policy.
        seed: Of the random samples of large fleets; None: another one each time.
    """

    def __init__(self, host: PluginHost, policy: Policy, *, seed: int | None = None) -> None:
        host.start(policy)
        rules = policy.scheduler
        self._hooks = host.scheduler
        self._weights = weights_of(rules)
        self._weightless = frozenset(name for name, weight in self._weights.items() if weight == 0)
        self._candidates = rules.candidates
        self._prefills = rules.queue.prefills_per_worker
        self._not_asked = frozenset({*SPLIT_RULES, *PICKERS} - {rules.split.rule, rules.pick})
        self._random = random.Random(seed).random
        self._lock = threading.Lock()
        self._turn = 0
        self._last_turn: dict[tuple[Role, str], int] = {}

    def decide(
        self, profile: RequestProfile, fleet: FleetView, trace: Trace | None = None
    ) -> Decision:
        """Return the route of a request and why it was chosen.

        Args:
            profile: The request.
            fleet: The workers and their loads.
            trace: Takes every step and what plugins said.

        Raises:
            NoCapacityError: The request is refused, or no decode worker can take it.
        """
        trace = Trace() if trace is None else trace
        refusal = None
        if not profile.admitted:
            refusal = self._hooks.select_admission(profile, fleet, trace)
        if refusal is not None:
            raise NoCapacityError(
                refusal.reason, retry_after_s=refusal.retry_after_s, status=refusal.status
            )
        split = self._split(profile, fleet, trace)
        if not split.split:
            whole, problem = self._worker(profile, Role.DECODE, fleet, whole_ones, trace)
            if whole is not None:
                return Decision(Local(whole), split.reason)
            split = self._forced(profile, fleet, split, problem)
        pairs = Pairs(fleet)
        decode, problem = self._worker(profile, Role.DECODE, fleet, pairs.decodes, trace)
        prefill: Worker | None = None
        if decode is not None:
            able = partial(pairs.prefills, decode=decode)
            prefill, problem = self._worker(profile, Role.PREFILL, fleet, able, trace, other=decode)
        if decode is None or prefill is None:
            taken = self._taken(fleet, pairs, decode)
            problem = f"split is off: {pairs.problem}" if pairs.problem else problem
            if decode is None or not decode.whole:
                decode, why = self._worker(profile, Role.DECODE, fleet, whole_ones, trace)
                problem = problem if pairs.problem or fleet.serving(Role.DECODE) else why
            if decode is None:
                raise NoCapacityError(problem, retry_after_s=RETRY_NO_WORKER_S, taken=taken)
            return Decision(Local(decode), problem, pairs.problem, taken)
        if prefill.name == decode.name:
            return Decision(
                Local(decode), f"worker {decode.name!r} is the best choice for both phases"
            )
        return Decision(Disaggregated(prefill, decode), split.reason)

    def _taken(self, fleet: FleetView, pairs: Pairs, decode: Worker | None) -> bool:
        """Return whether some prefill worker could hand over to ``decode``, but has no slot."""
        if decode is None:
            return False
        most = self._prefills
        return any(
            worker.name != decode.name
            and not has_slot(worker, fleet, most)
            and pairs.fit(worker, decode)
            for worker in fleet.serving(Role.PREFILL)
        )

    def _forced(
        self, profile: RequestProfile, fleet: FleetView, split: SplitDecision, problem: str
    ) -> SplitDecision:
        """Return the split of a request that is not to be split where no worker serves it whole.

        Raises:
            NoCapacityError: It cannot be split either, or there is no worker at all.
        """
        dependent = [w for w in fleet.serving(Role.DECODE) if not w.whole]
        if not dependent:
            raise NoCapacityError(problem, retry_after_s=RETRY_NO_WORKER_S)
        if profile.unsplittable is not None:
            raise NoCapacityError(
                f"this request {split.reason}, and no healthy worker here serves whole requests "
                "(role both, or an engine whose decode workers can)",
                retry_after_s=RETRY_NO_WORKER_S,
                status=400,
            )
        return SplitDecision(True, f"{dependent[0].name} takes handed-over requests only")

    def queue_score(self, profile: RequestProfile) -> float:
        """Return how urgent a request is that waits for a prefill worker, from 0 to 1."""
        return self._hooks.score_queue(profile, self._weights, without=self._weightless)

    @property
    def wants_ends(self) -> bool:
        """Whether some plugin wants to be told how requests end."""
        return self._hooks.wants_request_end

    def request_ended(self, record: Mapping[str, object]) -> None:
        """Tell the plugins how a request ended."""
        self._hooks.on_request_end(record)

    def _split(self, profile: RequestProfile, fleet: FleetView, trace: Trace) -> SplitDecision:
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        decision = self._hooks.select_split(profile, fleet, trace, without=self._not_asked)
        return decision or SplitDecision(False, "no plugin asked for a split")

    def _worker(
        self,
        profile: RequestProfile,
        role: Role,
        fleet: FleetView,
        able: Callable[[Sequence[Worker]], list[Worker]],
        trace: Trace,
        *,
        other: Worker | None = None,
    ) -> tuple[Worker | None, str]:
        """Return the worker for ``role``, or None and why there is none.

        Only those that ``able`` returns are looked at. ``other`` holds the other role of this
        request: among equals it comes last.
        """
        serving = fleet.serving(role)
        workers: tuple[Worker, ...] = ()
        if len(serving) > 2 * self._candidates:
            sample = self._sample(profile, role, fleet, trace)
            workers, _ = self._left(profile, role, sample, able, fleet, trace, other)
        if not workers:
            workers, why = self._left(profile, role, serving, able, fleet, trace, other)
            if not workers:
                return None, why
        if len(workers) == 1:  # nothing is left to choose
            (only,) = workers
            with self._lock:
                self._chosen(role, only.name, fleet)
            trace.note("chosen", role, ((CORE, only.name),))
            return only, ""
        scored = self._hooks.score_workers(
            profile, role, workers, fleet, self._weights, trace, other, without=self._weightless
        )
        name = self._hooks.select_worker(profile, role, scored, trace, without=self._not_asked)
        with self._lock:
            if name is None:
                name = self._best(role, scored, None if other is None else other.name)
            self._chosen(role, name, fleet)
        trace.note("chosen", role, ((CORE, name),))
        return [worker for worker in workers if worker.name == name][0], ""

    def _left(
        self,
        profile: RequestProfile,
        role: Role,
        workers: Sequence[Worker],
        able: Callable[[Sequence[Worker]], list[Worker]],
        fleet: FleetView,
        trace: Trace,
        other: Worker | None,
    ) -> tuple[tuple[Worker, ...], str]:
        """Return the workers that are able and left by all filters, or none and why."""
        candidates = able(workers)
        if not candidates:
            return (), f"no healthy {role} worker"
        left, left_out_by = self._hooks.filter_workers(
            profile, role, candidates, fleet, trace, other
        )
        return left, f"no {role} worker left by {', '.join(left_out_by)}"

    def _sample(
        self, profile: RequestProfile, role: Role, fleet: FleetView, trace: Trace
    ) -> list[Worker]:
        """Return random workers of a role and the nominated ones, each once.

        The best of a few random choices is nearly as good as the best of all, and herds less:
        Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
        """
        serving, draw = fleet.serving(role), self._random
        drawn = [serving[int(draw() * len(serving))] for _ in range(self._candidates)]
        found = {worker.name: worker for worker in drawn}
        nominated = self._hooks.nominate_workers(
            profile, role, fleet, trace, without=self._weightless
        )
        for name in nominated:
            worker = None if name in found else fleet.worker(name)
            if worker is not None and worker.role.serves(role) and fleet.load(worker).healthy:
                found[name] = worker
        return list(found.values())

    def _best(self, role: Role, scored: Mapping[str, float], other: str | None) -> str:
        if len(scored) == 1:
            return next(iter(scored))
        highest = max(scored.values())
        equals = [name for name, score in scored.items() if score >= highest - TIE]
        if len(equals) == 1:
            return equals[0]
        return min(equals, key=lambda name: (name == other, self._last_turn.get((role, name), 0)))

    def _chosen(self, role: Role, name: str, fleet: FleetView) -> None:
        self._turn += 1
        self._last_turn[role, name] = self._turn
        if len(self._last_turn) > 2 * len(fleet.workers) + 2:  # workers came and went
            present = {worker.name for worker in fleet.workers}
            self._last_turn = {k: v for k, v in self._last_turn.items() if k[1] in present}


def whole_ones(workers: Sequence[Worker]) -> list[Worker]:
    """Return the workers that can serve a request alone."""
    return [worker for worker in workers if worker.whole]


class Pairs:
    """Which of a fleet's healthy workers can share a handoff.

    Attributes:
        problem: Why the last prefill worker that was looked at in vain did not fit; or empty.
    """

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet
        self._any = bool(fleet.pair_problems)
        self.problem = ""

    def fit(self, prefill: Worker, decode: Worker) -> bool:
        """Return whether these two can share a handoff."""
        problem = self._fleet.pair_problem(prefill, decode) if self._any else None
        self.problem = problem or self.problem
        return problem is None and prefill.handoffs

    def prefills(self, workers: Sequence[Worker], decode: Worker) -> list[Worker]:
        """Return the workers that can hand over to ``decode``."""
        if self._any:
            return [worker for worker in workers if self.fit(worker, decode)]
        return [worker for worker in workers if worker.handoffs]

    def decodes(self, workers: Sequence[Worker]) -> list[Worker]:
        """Return the workers to which some prefill worker can hand over."""
        able = [worker for worker in workers if worker.handoffs]
        if not self._any:
            return able
        serving = self._fleet.serving(Role.PREFILL)
        return [worker for worker in able if any(self.fit(p, worker) for p in serving)]
