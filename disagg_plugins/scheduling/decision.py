"""From a request profile and the fleet's state to a route: asks the scheduler hooks in order.

Pure and synchronous: it knows no clock, no socket and no event loop, so the gateway and the
simulator decide with the same code.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.policy import SPLIT_RULES
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
    from collections.abc import Callable, Mapping

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
    """

    def __init__(self, host: PluginHost, policy: Policy) -> None:
        host.start(policy)
        self._hooks = host.scheduler
        self._weights = dict(policy.scheduler.weights)
        self._not_asked = frozenset({*SPLIT_RULES} - {policy.scheduler.split.rule})
        self._lock = threading.Lock()
        self._turn = 0
        self._last_turn: dict[tuple[Role, str], int] = {}

    def decide(self, profile: RequestProfile, fleet: FleetView) -> Decision:
        """Return the route of a request and why it was chosen.

        Raises:
            NoCapacityError: The request is refused, or no decode worker can take it.
        """
        refusal = self._hooks.select_admission(profile, fleet)
        if refusal is not None:
            raise NoCapacityError(
                refusal.reason, retry_after_s=refusal.retry_after_s, status=refusal.status
            )
        split = self._split(profile, fleet)
        if not split.split:
            whole, problem = self._worker(profile, Role.DECODE, fleet, serves_whole)
            if whole is not None:
                return Decision(Local(whole), split.reason)
            split = self._forced(profile, fleet, split, problem)
        pairs = Pairs(fleet)
        decode, problem = self._worker(profile, Role.DECODE, fleet, pairs.has_prefill)
        prefill: Worker | None = None
        if decode is not None:
            prefill, problem = self._worker(
                profile, Role.PREFILL, fleet, partial(pairs.fit, decode=decode), other=decode
            )
        if decode is None or prefill is None:
            problem = f"split is off: {pairs.problem}" if pairs.problem else problem
            if decode is None or not decode.whole:
                decode, why = self._worker(profile, Role.DECODE, fleet, serves_whole)
                problem = problem if pairs.problem or fleet.serving(Role.DECODE) else why
            if decode is None:
                raise NoCapacityError(problem, retry_after_s=RETRY_NO_WORKER_S)
            return Decision(Local(decode), problem, pairs.problem)
        if prefill.name == decode.name:
            return Decision(
                Local(decode), f"worker {decode.name!r} is the best choice for both phases"
            )
        return Decision(Disaggregated(prefill, decode), split.reason)

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
        return self._hooks.score_queue(profile, self._weights)

    @property
    def wants_ends(self) -> bool:
        """Whether some plugin wants to be told how requests end."""
        return self._hooks.wants_request_end

    def request_ended(self, record: Mapping[str, object]) -> None:
        """Tell the plugins how a request ended."""
        self._hooks.on_request_end(record)

    def _split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        decision = self._hooks.select_split(profile, fleet, without=self._not_asked)
        return decision or SplitDecision(False, "no plugin asked for a split")

    def _worker(
        self,
        profile: RequestProfile,
        role: Role,
        fleet: FleetView,
        able: Callable[[Worker], bool],
        *,
        other: Worker | None = None,
    ) -> tuple[Worker | None, str]:
        """Return the worker for ``role``, or None and why there is none.

        Workers that are not ``able`` are left out. ``other`` holds the other role of this request:
        among equals it comes last.
        """
        candidates = tuple(filter(able, fleet.serving(role)))
        if not candidates:
            return None, f"no healthy {role} worker"
        workers, left_out_by = self._hooks.filter_workers(profile, role, candidates, fleet)
        if not workers:
            return None, f"no {role} worker left by {', '.join(left_out_by)}"
        scored = self._hooks.score_workers(profile, role, workers, fleet, self._weights)
        name = self._hooks.select_worker(profile, role, scored)
        with self._lock:
            if name is None:
                name = self._best(role, scored, None if other is None else other.name)
            self._chosen(role, name, fleet)
        return next(worker for worker in workers if worker.name == name), ""

    def _best(self, role: Role, scored: Mapping[str, float], other: str | None) -> str:
        if len(scored) == 1:
            return next(iter(scored))
        highest = max(scored.values())
        equals = [name for name, score in scored.items() if score >= highest - TIE]
        return min(equals, key=lambda name: (name == other, self._last_turn.get((role, name), 0)))

    def _chosen(self, role: Role, name: str, fleet: FleetView) -> None:
        self._turn += 1
        self._last_turn[role, name] = self._turn
        if len(self._last_turn) > 2 * len(fleet.workers) + 2:  # workers came and went
            present = {worker.name for worker in fleet.workers}
            self._last_turn = {k: v for k, v in self._last_turn.items() if k[1] in present}


def serves_whole(worker: Worker) -> bool:
    """Return whether a worker can serve a request alone."""
    return worker.whole


class Pairs:
    """Which of a fleet's healthy workers can share a handoff.

    Attributes:
        problem: Why the last prefill worker that was looked at in vain did not fit; or empty.
    """

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet
        self._prefills = [w for w in fleet.serving(Role.PREFILL) if w.handoffs]
        self.problem = ""

    def fit(self, prefill: Worker, decode: Worker) -> bool:
        """Return whether these two can share a handoff."""
        problem = self._fleet.pair_problem(prefill, decode)
        self.problem = problem or self.problem
        return problem is None and prefill.handoffs

    def has_prefill(self, decode: Worker) -> bool:
        """Return whether some prefill worker can hand over to ``decode``."""
        if not decode.handoffs:
            return False
        return not self._fleet.pair_problems or any(self.fit(p, decode) for p in self._prefills)
