"""Give a prefill worker no more prompts at once than the policy says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.types import FleetView, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.policy import Policy


class PrefillSlots:
    """Leaves out prefill workers that read ``scheduler.queue.prefills_per_worker`` prompts.

    An engine batches prompts up to its token budget; one more only makes all of them later, and
    what has been sent can no longer be overtaken by a more urgent one.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self._most = policy.scheduler.queue.prefills_per_worker

    @hookimpl
    def disagg_filter_workers(
        self, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> list[Worker] | None:
        """See ``hookspecs.disagg_filter_workers``."""
        most = self._most
        if most is None or role is not Role.PREFILL:
            return None
        return [worker for worker in workers if fleet.load(worker).prefills < most]


def has_slot(worker: Worker, fleet: FleetView, most: int | None) -> bool:
    """Return whether a prefill worker can be given one more prompt now."""
    load = fleet.load(worker)
    if most is not None and load.prefills >= most:
        return False
    return load.requests < (1 if load.trial else worker.capacity)
