"""Learn how fast the workers are from the requests that they served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.profile_file import read_profile, seed
from disagg_plugins.scheduling.uses_predictor import UsesPredictor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.policy import Policy


class Learning(UsesPredictor):
    """Keeps the predictor up to date, for the rules that decide by it."""

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``; reads the profile that ``scheduler.profile`` names."""
        profile = policy.scheduler.profile
        measured = None if profile is None else read_profile(profile)
        with self.predictor.lock:
            for worker in policy.fleet.workers:
                self.predictor.know(worker.worker())
            if measured is not None:
                seed(self.predictor, measured)

    @hookimpl
    def disagg_on_request_end(self, record: Mapping[str, object]) -> None:
        """See ``hookspecs.disagg_on_request_end``."""
        with self.predictor.lock:
            self.predictor.observe(record)
