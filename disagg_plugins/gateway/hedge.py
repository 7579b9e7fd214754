"""A second call for an answer that has not begun: whichever worker speaks first, answers.

Dean and Barroso, "The Tail at Scale", 2013, call it a hedged request. It costs the work of a whole
prompt, so it is off unless the policy asks for it, and it is paid from the budget of retries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from disagg_plugins.gateway.calls import HEDGE

if TYPE_CHECKING:
    from disagg_plugins.gateway.calls import Calls
    from disagg_plugins.gateway.upstream import Call
    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.types import Worker, WorkerLoad


class Hedge:
    """Hears a hedge until it speaks or fails (a ``CallListener``).

    Args:
        worker: Who was asked.
        load: Its load then, without this request.
        calls: Of the request.
        speaks: Called with the first bytes of its answer, once.
        failed: Called with a word for metrics, and a detail for people, once.
    """

    __slots__ = ("_calls", "_failed", "_speaks", "load", "worker")

    def __init__(
        self,
        worker: Worker,
        load: WorkerLoad,
        calls: Calls,
        speaks: Callable[[bytes], None],
        failed: Callable[[str, str], None],
    ) -> None:
        self.worker = worker
        self.load = load
        self._calls = calls
        self._speaks = speaks
        self._failed = failed

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        """The head of its answer came."""
        heard = self._calls.heard[HEDGE]
        heard.status, heard.headers = status, headers
        if status != 200:
            call.cancel()
            self._failed(f"http_{status}", f"asked as a hedge, it answered {status}")

    def call_data(self, call: Call, data: bytes) -> None:
        """Its answer has begun."""
        self._speaks(data)

    def call_end(self, call: Call) -> None:
        """It answered nothing."""
        self._failed("garbage", "asked as a hedge, it answered nothing")

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        """It gave no answer."""
        self._failed(kind, detail)
