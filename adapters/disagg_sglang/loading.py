"""Loads one request's KV into the pages that SGLang gave it, in a thread of the manager's.

Imports no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from disagg_plugins.errors import DisaggError, RemoteProtocolError
from disagg_plugins.handoff.cancellation import Cancellation
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_plugins.types import HandoffId
from disagg_sglang.result import PrefillResult, unpack_result

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from disagg_plugins.handoff.interfaces import LoadReport, Sink
    from disagg_plugins.handoff.reader import HandoffReader
    from disagg_plugins.handoff.tickets import Ticket
    from disagg_sglang.room import Room

logger = logging.getLogger(__name__)

LoadState = Literal["idle", "ready", "loading", "done", "failed"]

Report = Callable[[dict[str, object]], object]


class ClosableSink(Protocol):
    """Where KV goes until the engine takes the pages back; see ``pools.PageSink``."""

    def close(self) -> None:
        """Let nothing be written from now on."""
        ...

    def finish(self, write: Callable[[], None]) -> None:
        """Call ``write`` unless closed, and close."""
        ...


class Free(Protocol):
    """A point of the engine's work on a device: ``torch.cuda.Event`` is one."""

    def synchronize(self) -> None:
        """Return when the device has come to it."""
        ...


class NoSink:
    """For a prompt that is in the decode worker's cache: only the first token is wanted."""

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Drop the rows."""

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Drop the KV."""


class PageLoad:
    """One request's load.

    Args:
        ticket: Verified for this worker.
        room: What the gateway told.
        token_ids: The prompt.
        reader: Loads from peers.
        executor: Where loads run.
        wait_s: How long prefill may take until it opens the handoff.
        report: Tells the gateway.
    """

    def __init__(
        self,
        ticket: Ticket,
        room: Room,
        token_ids: Sequence[int],
        *,
        reader: HandoffReader,
        executor: Executor,
        wait_s: float,
        report: Report,
    ) -> None:
        self.state: LoadState = "idle"
        self.reason = ""
        self._ticket = ticket
        self._room = room
        self._endpoints = room.parsed_endpoints()
        self._num_tokens = len(token_ids)
        self._prompt = prompt_digest(token_ids)
        self._reader = reader
        self._executor = executor
        self._wait_s = wait_s
        self._report = report
        self._cancellation = Cancellation()
        self._lock = threading.Lock()
        self._pages: ClosableSink | None = None

    def start(
        self,
        sink: Sink,
        pages: ClosableSink,
        first_token: int,
        commit: Callable[[PrefillResult], None],
        *,
        free: Free | None = None,
    ) -> None:
        """Load tokens from ``first_token`` on into ``sink``.

        Args:
            sink: Where the bytes go.
            pages: The same sink, as what is closed when the engine takes the pages back.
            first_token: Tokens before it are in the decode worker's cache.
            commit: Takes what prefill left, after all KV has been written.
            free: When nobody else writes the pages any more, if the device may still do.
        """
        with self._lock:
            if self.state == "failed":
                return
            self.state, self._pages = "loading", pages
        started_s = time.monotonic()
        self._executor.submit(self._load, sink, pages, first_token, commit, free, started_s)

    def _load(
        self,
        sink: Sink,
        pages: ClosableSink,
        first_token: int,
        commit: Callable[[PrefillResult], None],
        free: Free | None,
        started_s: float,
    ) -> None:
        try:
            if free is not None:
                free.synchronize()
            whole = first_token >= self._num_tokens
            report = self._reader.load(
                HandoffId(self._ticket.handoff_id),
                self._room.ticket,
                self._endpoints,
                first_token=self._num_tokens - 1 if whole else first_token,
                end_token=self._num_tokens,
                sink=NoSink() if whole else sink,
                prompt=self._prompt,
                started_s=started_s,
                wait_s=self._wait_s,
                cancellation=self._cancellation,
            )
            result = self._result(report)
            pages.finish(lambda: commit(result))
            with self._lock:
                if self.state == "loading":
                    self.state = "done"
            self._tell_loaded(report, first_token)
        except DisaggError as error:
            self._fail(f"{type(error).__name__}: {error}")
        except Exception as error:
            logger.exception("handoff %s: the load failed", self._ticket.handoff_id)
            self._fail(f"{type(error).__name__}: {error}")

    def _result(self, report: LoadReport) -> PrefillResult:
        if report.result:
            return unpack_result(report.result)
        if self._room.first_token >= 0:
            return PrefillResult(self._room.first_token, 0, "", b"")
        raise RemoteProtocolError(
            "neither the prefill worker nor the gateway told the first token of the answer"
        )

    def _tell_loaded(self, report: LoadReport, first_token: int) -> None:
        self._report(
            {
                "kind": "loaded",
                "handoff_id": report.handoff_id,
                "num_tokens": self._num_tokens - min(first_token, self._num_tokens),
                "tokens_local": min(first_token, self._num_tokens),
                "tokens_recomputed": 0,
                "bytes": report.payload_bytes,
                "transport": report.transport,
                "form": report.form,
                "seconds": report.seconds,
            }
        )

    def _fail(self, reason: str) -> None:
        with self._lock:
            told = self.state == "failed"
            self.state, self.reason = "failed", self.reason or reason
        if self._pages is not None:
            self._pages.close()
        if not told:
            logger.warning("handoff %s is not loaded: %s", self._ticket.handoff_id, reason)
        self._report(
            {"kind": "failed", "handoff_id": self._ticket.handoff_id, "problem": self.reason[:500]}
        )

    def abort(self, reason: str) -> None:
        """Give the load up: when this returns nothing more is written. Idempotent."""
        with self._lock:
            self.state, self.reason = "failed", self.reason or reason
        if self._pages is not None:
            self._pages.close()
        self._cancellation.cancel(reason)
