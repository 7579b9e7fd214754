"""Prefer a worker to which, or from which, KV travels cheaply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.worker_scores import nearness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import Worker


class TransferCost:
    """Scores a worker by its distance from the one that has the request's other part.

    Hosts are told apart by ``labels.host`` or else by the URL, zones by ``labels.zone``.
    """

    @hookimpl
    def disagg_score_workers(
        self, workers: Sequence[Worker], other: Worker | None
    ) -> dict[str, float] | None:
        """See ``hookspecs.disagg_score_workers``."""
        if other is None:
            return None
        return nearness(workers, other)
