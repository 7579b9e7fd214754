"""Split a request that leaves enough of its prompt to be read to be worth moving."""

from __future__ import annotations

from itertools import islice

from disagg_plugins import hookimpl
from disagg_plugins.policy import Policy, SplitPolicy
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision

MOST_HOLDERS = 64
"""Workers looked at that are believed to hold a part of the prompt."""


class Threshold:
    """Splits from ``scheduler.split.min_prompt_tokens`` on, not counting what decode holds already.

    Reading a short prompt disturbs the decode worker less than the handoff costs, and what its
    prefix cache holds is not read again.
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
        cached = min(tokens, most_cached(profile, fleet))
        left = tokens - cached
        count = f"{tokens}" if profile.prompt_tokens_exact else f"about {tokens}"
        if cached:
            count += f" less {cached} that a decode worker holds, so {left}"
        if left < least:
            return SplitDecision(
                False, f"{count} prompt tokens, under the {least} from which splitting pays"
            )
        if not fleet.serving(Role.PREFILL):
            return SplitDecision(False, "no healthy prefill worker")
        return SplitDecision(True, f"{count} prompt tokens, at least {least}")


def most_cached(profile: RequestProfile, fleet: FleetView) -> int:
    """Return the most prompt tokens that a healthy decode worker is believed to hold."""
    if not profile.cached_tokens:
        return 0
    most = 0
    for name, tokens in islice(profile.cached_tokens.items(), MOST_HOLDERS):
        worker = fleet.worker(name) if tokens > most else None
        if worker is not None and worker.role.serves(Role.DECODE) and fleet.load(worker).healthy:
            most = tokens
    return most
