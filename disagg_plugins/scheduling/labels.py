"""Keep a tenant's requests on workers that carry the labels it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from disagg_plugins.policy import Policy
    from disagg_plugins.types import RequestProfile, Worker

EVERYBODY = "*"
"""The entry of tenants that have none of their own, and of requests without a tenant."""


class Labels:
    """Leaves out workers that lack what ``scheduler.labels`` asks for."""

    def __init__(self) -> None:
        self.required: Mapping[str, Mapping[str, str]] = {}

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self.required = policy.scheduler.labels

    @hookimpl
    def disagg_filter_workers(
        self, profile: RequestProfile, workers: Sequence[Worker]
    ) -> list[Worker] | None:
        """See ``hookspecs.disagg_filter_workers``."""
        required = self.required
        if not required:
            return None
        wanted = required.get(profile.tenant or EVERYBODY, required.get(EVERYBODY))
        if not wanted:
            return None
        return [w for w in workers if all(w.labels.get(k) == v for k, v in wanted.items())]
