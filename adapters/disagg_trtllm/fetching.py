"""Prompts that were announced to be decoded, fetched before their requests come.

TensorRT-LLM has no way to say that a load failed. So KV is fetched into memory here, and only what
is here is offered as matched. One fetch brings the heads of all ranks; the ranks map the memory.
What nobody asks for is freed by its lease.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disagg_plugins.engine.block_kv import BlockSink
from disagg_plugins.errors import LocalProtocolError, StagingFull
from disagg_plugins.handoff.endpoints import from_json
from disagg_plugins.handoff.staging import ArenaFull, StagingArena
from disagg_trtllm.plan import Staged

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import LoadReport
    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_plugins.handoff.reader import HandoffReader
    from disagg_plugins.handoff.tickets import Ticket

log = logging.getLogger(__name__)

SWEEP_S = 1.0
"""Longest pause between two looks at the leases; a quarter of the lease if that is shorter."""

CLOSE_S = 5.0

TAKEN_LEASES = 4
"""Leases for what is about to be copied: an iteration may compile for long. Who copies later than
that fails rather than copy what may be another prompt's by now."""

MOST_ENTRIES = 4096
"""Fetched prompts at once; each is bounded by the staging as well."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """One prompt's KV, here.

    Attributes:
        request_id: Of the request that it is for.
        handoff_id: Of the handoff.
        num_tokens: Of the prompt.
        prompt: Its digest.
        staged: Where it is.
        report: Of the fetch.
        until_s: Monotonic time at which it is freed where nobody has taken it.
    """

    request_id: int
    handoff_id: str
    num_tokens: int
    prompt: str
    staged: Staged
    report: LoadReport
    until_s: float


class Fetcher:
    """Fetches and keeps; thread-safe. Close it.

    Args:
        layout: Of all heads.
        reader: Loads from peers.
        staging_bytes: Bound on what is kept.
        lease_s: How long an untaken prompt is kept.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        layout: KVLayout,
        reader: HandoffReader,
        *,
        staging_bytes: int,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._reader, self._lease_s, self._clock = layout, reader, lease_s, clock
        self._arena = StagingArena(staging_bytes)
        self._lock = threading.Lock()
        self._here: dict[int, Fetched] = {}
        self._taken: dict[int, Fetched] = {}
        self._closed = False
        self._ending = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_often, name="disagg-sweep", daemon=True)
        self._sweeper.start()

    def _sweep_often(self) -> None:
        every_s = min(SWEEP_S, self._lease_s / 4)
        while not self._ending.wait(every_s):
            self.sweep()

    @property
    def used_bytes(self) -> int:
        """Staging in use."""
        return self._arena.used_bytes

    def fetch(
        self,
        request_id: int,
        ticket: Ticket,
        text: str,
        *,
        num_tokens: int,
        prompt: str,
        endpoints: Sequence[Mapping[str, object]],
    ) -> Fetched:
        """Fetch a prompt's KV; blocks the calling thread, at most ``handoff.load_s``.

        Raises:
            DisaggError: It is not here, and nothing of it is kept.
        """
        blocks = self._layout.num_blocks(num_tokens)
        num_bytes = self._layout.staged_bytes(num_tokens)
        with self._lock:
            self._check_new(request_id)
        try:
            offset = self._arena.allocate(num_bytes)
        except ArenaFull as exc:
            raise StagingFull(
                ticket.handoff_id,
                wanted_bytes=exc.wanted_bytes,
                free_bytes=exc.free_bytes,
                bound_bytes=self._arena.size_bytes,
            ) from exc
        try:
            kv = self._arena.view(offset, num_bytes)
            kv = kv.reshape(blocks, self._layout.num_layers, self._layout.row_bytes)
            report = self._reader.load(
                ticket.handoff_id,
                text,
                from_json(list(endpoints)),
                first_token=0,
                end_token=num_tokens,
                sink=BlockSink(kv, self._layout, range(blocks)),
                prompt=prompt,
            )
            if not report.prompt:
                raise LocalProtocolError("the publisher does not say whose KV this is")
            fetched = Fetched(
                request_id,
                ticket.handoff_id,
                num_tokens,
                report.prompt,
                Staged(os.getpid(), self._fd(), offset, blocks),
                report,
                self._clock() + self._lease_s,
            )
            with self._lock:
                self._check_new(request_id)
                self._here[request_id] = fetched
        except BaseException:
            self._arena.free(offset)
            raise
        return fetched

    def _check_new(self, request_id: int) -> None:
        if request_id in self._here or request_id in self._taken:
            raise LocalProtocolError(f"request {request_id} was announced before")
        if self._closed or len(self._here) + len(self._taken) >= MOST_ENTRIES:
            raise LocalProtocolError("this worker takes no more announcements")

    def _fd(self) -> int:
        descriptor = self._arena.fd
        if descriptor is None:
            raise LocalProtocolError("this system has no memfd, which ranks share KV by")
        return descriptor

    def look(self, request_id: int) -> Fetched | None:
        """Return what was fetched for a request, if it is here and its lease holds."""
        with self._lock:
            found = self._here.get(request_id)
        return found if found is not None and self._clock() < found.until_s else None

    def take(self, request_id: int) -> Fetched | None:
        """Keep what was fetched until ``drop``: it is about to be copied.

        A lease begins anew, for the 1.2-era tells nobody of a request that is cancelled.
        """
        with self._lock:
            found = self._here.pop(request_id, None)
            if found is not None:
                until_s = self._clock() + TAKEN_LEASES * self._lease_s
                found = self._taken[request_id] = replace(found, until_s=until_s)
        return found

    def has(self, request_id: int) -> bool:
        """Return whether what was fetched for a request is still kept."""
        with self._lock:
            return request_id in self._here or request_id in self._taken

    def drop(self, request_id: int) -> Fetched | None:
        """Free what was fetched for a request; idempotent."""
        with self._lock:
            where = self._here if request_id in self._here else self._taken
            found = where.pop(request_id, None)
        if found is not None:
            self._arena.free(found.staged.offset)
        return found

    def sweep(self) -> list[Fetched]:
        """Free what nobody came for; returns it."""
        now_s = self._clock()
        with self._lock:
            late = []
            for kept in (self._here, self._taken):
                gone = [each for each in kept.values() if each.until_s <= now_s]
                late += gone
                for each in gone:
                    del kept[each.request_id]
        for each in late:
            self._arena.free(each.staged.offset)
            log.warning("handoff %s: nobody came for its KV; freed", each.handoff_id)
        return late

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._closed = True
        self._ending.set()
        self._sweeper.join(CLOSE_S)
        self._reader.close()
        self._arena.close()
