"""A request whose prompt is being counted on a thread, before it is routed.

Its wait is bounded: after ``scheduler.tokenizer_s`` the estimate stands. A client that leaves
meanwhile is gone without a trace. What nobody waits for any more is not counted when its turn
comes: threads that are behind would otherwise stay behind, and every result would come too late.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.gateway.reply import Client
    from disagg_plugins.gateway.token_counter import Counting, Ids, TokenCounter


class WaitsForCount:
    """Goes on with a request once its prompt is counted, or has been estimated long enough.

    Args:
        counter: Whose threads count.
        go_on: Called once with the ids, or with None when there is only the estimate. Not called
            when the client went.
        ended: Called at the end, however it came about.
    """

    def __init__(
        self,
        counter: TokenCounter,
        go_on: Callable[[Ids | None], None],
        ended: Callable[[WaitsForCount], None],
    ) -> None:
        self._counter = counter
        self._go_on = go_on
        self._ended = ended
        self._over = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, client: Client, counting: Counting, within_s: float) -> bool:
        """Begin to count; False when too many prompts wait already: nothing was begun then."""
        future = self._counter.submit(lambda: None if self._over else counting.ids())
        if future is None:
            return False
        client.answering(self)
        loop = asyncio.get_running_loop()

        def arrived(done: Future[Ids | None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._arrived, done)

        self._timer = loop.call_later(within_s, self._late)
        future.add_done_callback(arrived)
        return True

    def client_gone(self) -> None:
        """The client closed its connection."""
        self._end()

    def client_slow(self, slow: bool) -> None:
        """Nothing is sent yet."""

    def _arrived(self, done: Future[Ids | None]) -> None:
        self._counter.left()
        try:
            ids = done.result()
        except CancelledError:
            ids = None
        if self._end():
            self._go_on(ids)

    def _late(self) -> None:
        if self._end():
            self._go_on(None)

    def _end(self) -> bool:
        """End the wait; False when it had ended before."""
        if self._over:
            return False
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._ended(self)
        return True
