"""Loads that run beside the test."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from unittest import mock

from disagg_plugins.handoff.tickets import new_handoff_id
from disagg_plugins.testing.handoffs import WAIT_S, RecordingSink

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from disagg_plugins.handoff.cancellation import Cancellation
    from disagg_plugins.handoff.interfaces import LoadReport
    from disagg_plugins.handoff.reader import HandoffReader
    from disagg_plugins.testing.handoffs import World

LONG_S = 600.0
"""A bound that no test waits for."""


class EarlyLoad:
    """A load whose handoff is not open on rank ``waits_at``; made once that rank waits for it."""

    def __init__(
        self,
        world: World,
        pool: ThreadPoolExecutor,
        *,
        handoff_id: str | None = None,
        reader: HandoffReader | None = None,
        wait_s: float = LONG_S,
        cancellation: Cancellation | None = None,
        waits_at: int = 0,
    ) -> None:
        self.handoff_id = handoff_id or new_handoff_id()
        self.sink = RecordingSink()
        self._result: Future[LoadReport]
        store, claimed = world.stores[waits_at], threading.Event()
        wait_open = store.wait_open

        def watched(handoff_id: str, slice_s: float) -> bool:
            claimed.set()
            return wait_open(handoff_id, slice_s)

        with mock.patch.object(store, "wait_open", watched):
            self._result = pool.submit(
                (reader or world.reader()).load,
                self.handoff_id,
                world.ticket(self.handoff_id),
                world.endpoints,
                first_token=0,
                end_token=40,
                sink=self.sink,
                wait_s=wait_s,
                cancellation=cancellation,
            )
            assert claimed.wait(WAIT_S)

    def result(self) -> LoadReport:
        """Return what the load did, or raise what it raised."""
        return self._result.result(WAIT_S)
