"""Prefer the worker with the fewest tokens still to be read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.scheduling.worker_scores import outstanding
from disagg_plugins.types import FleetView, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence


class OutstandingTokens:
    """Scores by outstanding tokens against capacity; 1 is an idle worker.

    Requests differ a hundredfold in length, so tokens tell more of the work than requests do.
    """

    @hookimpl
    def disagg_score_workers(
        self, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float]:
        """See ``hookspecs.disagg_score_workers``."""
        return outstanding(workers, fleet.loads, written_too=role is not Role.PREFILL)
