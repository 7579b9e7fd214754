"""Prefer the worker that holds the prompt's beginning already."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.worker_scores import cached_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import RequestProfile, Worker

NOMINEES = 2
"""Holders looked at beside the sample of a large fleet: the best, and one to level its load."""


class PrefixAffinity:
    """Scores by the share of the prompt that a worker is believed to hold.

    For whoever reads the prompt that share is work saved; for a decode worker of a split request
    it is KV that need not travel.
    """

    @hookimpl
    def disagg_score_workers(
        self, profile: RequestProfile, workers: Sequence[Worker]
    ) -> dict[str, float] | None:
        """See ``hookspecs.disagg_score_workers``."""
        cached, tokens = profile.cached_tokens, profile.prompt_tokens
        if not cached or not tokens:
            return None
        return cached_share(workers, cached, tokens)

    @hookimpl
    def disagg_nominate_workers(self, profile: RequestProfile) -> list[str] | None:
        """See ``hookspecs.disagg_nominate_workers``."""
        if not profile.cached_tokens:
            return None
        return list(islice(profile.cached_tokens, NOMINEES))
