"""Prefer a worker to which, or from which, KV travels cheaply."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import Worker

SAME_HOST = 1.0
SAME_ZONE = 0.7
UNKNOWN = 0.5
OTHER_ZONE = 0.3
"""Shared memory, a network inside a zone, no labels to tell, a network between zones: only their
order matters much; the policy's weight says how far it counts against load."""

UNLIKE_ENGINES = 0.5
"""Factor where KV goes through the canonical form, which costs about as much again as the copy."""


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
        return {worker.name: _nearness(worker, other) for worker in workers}


def _nearness(worker: Worker, other: Worker) -> float:
    zones = worker.labels.get("zone"), other.labels.get("zone")
    if _host(worker) == _host(other):
        near = SAME_HOST
    elif None in zones:
        near = UNKNOWN
    else:
        near = SAME_ZONE if zones[0] == zones[1] else OTHER_ZONE
    return near if worker.engine == other.engine else near * UNLIKE_ENGINES


def _host(worker: Worker) -> str:
    return worker.labels.get("host") or worker.url.rpartition(":")[0]
