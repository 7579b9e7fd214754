"""Split whatever can be split."""

from __future__ import annotations

from disagg_plugins import hookimpl
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision


class Always:
    """Splits every request: for fleets whose decode workers should read no prompt."""

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        if not fleet.serving(Role.PREFILL):
            return SplitDecision(False, "no healthy prefill worker")
        return SplitDecision(True, "the policy always splits")
