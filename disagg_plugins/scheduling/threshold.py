"""Split a request whose prompt is long enough to be worth moving."""

from __future__ import annotations

from disagg_plugins import hookimpl
from disagg_plugins.policy import Policy, SplitPolicy
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision


class Threshold:
    """Splits from ``scheduler.split.min_prompt_tokens`` on.

    Reading a short prompt disturbs the decode worker less than the handoff costs.
    """

    def __init__(self) -> None:
        self.min_prompt_tokens = SplitPolicy().min_prompt_tokens

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self.min_prompt_tokens = policy.scheduler.split.min_prompt_tokens

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        tokens, least = profile.prompt_tokens, self.min_prompt_tokens
        count = f"{tokens}" if profile.prompt_tokens_exact else f"about {tokens}"
        if tokens < least:
            return SplitDecision(
                False, f"{count} prompt tokens, under the {least} from which splitting pays"
            )
        if not fleet.serving(Role.PREFILL):
            return SplitDecision(False, "no healthy prefill worker")
        return SplitDecision(True, f"{count} prompt tokens, at least {least}")
