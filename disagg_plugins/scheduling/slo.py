"""Split when the predicted TTFT and TPOT keep the request's SLO better that way.

Both choices are predicted from what was measured (``prediction``): whole on the best decode worker,
or read on the best prefill worker and written on a decode worker. What each would come to, for the
request and for those beside it, is worked out in ``slo_choices``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.policy import Policy, SchedulerPolicy
from disagg_plugins.scheduling.candidates import Candidates
from disagg_plugins.scheduling.slo_choices import choices, prefills_of
from disagg_plugins.scheduling.threshold import Threshold
from disagg_plugins.scheduling.uses_predictor import UsesPredictor
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision

if TYPE_CHECKING:
    from disagg_plugins.scheduling.prediction import Predictor


class Slo(UsesPredictor):
    """Chooses what keeps both bounds; else the smaller excess; else the smaller time of all.

    Until each role has been measured (or a profile tells), it decides as ``threshold`` does.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        super().__init__(predictor)
        self._set(SchedulerPolicy())
        self._unmeasured = Threshold()

    def _set(self, rules: SchedulerPolicy) -> None:
        self._prefills = Candidates(rules.candidates)
        self._decodes = Candidates(rules.candidates)

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self._set(policy.scheduler)
        self._unmeasured.disagg_on_start(policy)

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        serving = fleet.serving(Role.PREFILL)
        looked_at = self._prefills.of(serving)
        prefills = prefills_of(looked_at, fleet)
        if not prefills:
            word = "with room" if serving else "that is healthy"
            return SplitDecision(False, f"no prefill worker {word}")
        decodes = self._decodes.of(fleet.serving(Role.DECODE))
        with self.predictor.lock:
            self.predictor.catch_up()
            found = choices(self.predictor, profile, fleet, looked_at, prefills, decodes)
        decided = found.decision()
        if decided is None:
            # also where every decode worker is full: the Scheduler finds the way out
            decision = self._unmeasured.disagg_select_split(profile, fleet)
            return SplitDecision(decision.split, f"not measured yet: {decision.reason}")
        return decided
