"""Split nothing."""

from __future__ import annotations

from disagg_plugins import hookimpl
from disagg_plugins.types import RequestProfile, SplitDecision


class Never:
    """Keeps every request whole: for a comparison, or while prefill workers are looked into."""

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        return SplitDecision(False, "the policy never splits")
