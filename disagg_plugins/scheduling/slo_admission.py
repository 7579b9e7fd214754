"""Refuse a request at once when no worker can begin its answer in time.

A client that is told after a second may go elsewhere; one that is told after its own time-out has
cost a slot and got nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.prediction import Predictor, queue_share
from disagg_plugins.scheduling.uses_predictor import UsesPredictor
from disagg_plugins.types import FleetView, Refusal, RequestProfile, Role

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy

LEAST_RETRY_S = 1.0


class SloAdmission(UsesPredictor):
    """Refuses when every choice exceeds ``refuse_over`` times the request's bound on TTFT.

    Or when its first token would come after the request's own deadline.

    What waits at the gateway counts as queued before the request. A choice that nothing is known of
    is taken to be in time. The first choice in time ends the search, so that only a refusal looks
    at every worker.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        super().__init__(predictor)
        self._refuse_over: float | None = None

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self._refuse_over = policy.scheduler.admission.refuse_over

    @hookimpl
    def disagg_select_admission(self, profile: RequestProfile, fleet: FleetView) -> Refusal | None:
        """See ``hookspecs.disagg_select_admission``."""
        over, slo_s, predictor = self._refuse_over, profile.ttft_slo_s, self.predictor
        if over is None or (slo_s is None and profile.deadline_s is None):
            return None
        bound_s, promise = float("inf"), ""
        if slo_s is not None:
            bound_s, promise = over * slo_s, f"its SLO class allows {slo_s:g} s"
        if profile.deadline_s is not None:
            left_s = profile.deadline_s - profile.arrival_s
            if left_s < bound_s:
                bound_s, promise = left_s, f"its client waits {left_s:g} s"
        with predictor.lock:
            predictor.catch_up()
            return self._refusal(predictor, profile, fleet, promise, bound_s)

    def _refusal(
        self,
        predictor: Predictor,
        profile: RequestProfile,
        fleet: FleetView,
        promise: str,
        bound_s: float,
    ) -> Refusal | None:
        best_s = self._best_s(predictor, profile, fleet, profile.queued_tokens, bound_s)
        if best_s is None or best_s <= bound_s:
            return None
        own, status, why = profile.own_queued_tokens, 503, ""
        if own:
            others = max(0, profile.queued_tokens - own)
            alone_s = self._best_s(predictor, profile, fleet, others, bound_s)
            if alone_s is None or alone_s <= bound_s:
                status, why = 429, "; the tenant's own waiting requests cause it"
        return Refusal(
            f"the first token would take {best_s:.2f} s, {promise}{why} "
            "(policy key scheduler.admission)",
            max(LEAST_RETRY_S, best_s - bound_s),
            status=status,
        )

    def _best_s(
        self,
        predictor: Predictor,
        profile: RequestProfile,
        fleet: FleetView,
        queued_tokens: int,
        bound_s: float,
    ) -> float | None:
        """Return the shortest predicted TTFT, or the first within the bound; None: unknown."""
        best_s = None
        for ttft_s in _choices_s(predictor, profile, fleet, queued_tokens):
            if ttft_s is None:
                return None
            best_s = ttft_s if best_s is None else min(best_s, ttft_s)
            if best_s <= bound_s:
                break
        return best_s


def _choices_s(
    predictor: Predictor, profile: RequestProfile, fleet: FleetView, queued_tokens: int
) -> Iterator[float | None]:
    tokens, cached = profile.prompt_tokens, profile.cached_tokens
    decodes = fleet.serving(Role.DECODE)
    prefills = fleet.serving(Role.PREFILL) if profile.unsplittable is None else ()
    ahead = queue_share(queued_tokens, fleet)
    taking = next((worker for worker in decodes if worker.handoffs), None)
    if taking is not None:
        handoff_s = predictor.handoff_s(taking, tokens) or 0.0
        for worker in prefills:
            if not worker.handoffs or worker.name == taking.name:
                continue
            fresh = tokens - cached.get(worker.name, 0)
            read_s = predictor.prefill_s(worker, fleet.load(worker), fresh, ahead)
            yield None if read_s is None else read_s + handoff_s
    for worker in decodes:
        if worker.whole:
            unread = tokens - cached.get(worker.name, 0)
            yield predictor.prefill_s(worker, fleet.load(worker), unread)
