"""What a prefill rank has staged for its peers.

The engine opens a ``Publication``, writes block rows layer by layer and marks them readable;
listeners serve them. ``state.py`` decides what may happen; this module adds the lock, the memory,
the waiting and the telling.

Memory of a handoff that has ended meanwhile stays untouched until its writer has let go as well,
so a late ``rows()`` view can never reach memory that belongs to another handoff: the writer lets
go by publishing the last row or by ``abort``, and must have finished writing when it does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.errors import HandoffAborted, LocalProtocolError, StagingFull
from disagg_plugins.handoff.messages import MAX_RESULT_BYTES
from disagg_plugins.handoff.shards import readers_of
from disagg_plugins.handoff.staging import ArenaFull, StagingArena
from disagg_plugins.handoff.state import HandoffState
from disagg_plugins.handoff.tickets import Ticket, check_valid_at
from disagg_plugins.types import HandoffEvent, HandoffId

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt

    from disagg_plugins.handoff.interfaces import Identity, Outcome, Unpack
    from disagg_plugins.policy import HandoffPolicy

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Ended handoffs whose end can still be told to a late peer; about 1 MB."""

SWEEP_INTERVAL_S = 1.0
"""Longest pause between two looks at the leases; a quarter of the lease if that is shorter."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot for metrics.

    Attributes:
        states: State -> handoffs in it now.
        outcomes: Outcome -> handoffs that ended so since the start.
        refused_full: ``open`` calls refused for lack of staging.
        used_bytes: Staging taken now.
        peak_bytes: The most staging ever taken at once.
        bound_bytes: Size of the staging arena.
        published_bytes: Bytes of rows made readable since the start.
    """

    states: Mapping[str, int]
    outcomes: Mapping[str, int]
    refused_full: int
    used_bytes: int
    peak_bytes: int
    bound_bytes: int
    published_bytes: int


class Publication:
    """One handoff being written. Made by ``PublicationStore.open``; thread-safe.

    Attributes:
        handoff_id: The handoff.
        num_tokens: Valid tokens.
        prompt: Digest of the prompt whose KV this is.
        num_blocks: Blocks that hold them.
        offset: Where its rows begin in the arena.
        progress: Counts calls of ``publish``; a waiting reader sees that the engine works.
    """

    def __init__(
        self,
        store: PublicationStore,
        state: HandoffState,
        num_tokens: int,
        offset: int,
        prompt: str = "",
    ) -> None:
        layout = store.identity.layout
        self.handoff_id = HandoffId(state.handoff_id)
        self.num_tokens = num_tokens
        self.prompt = prompt
        self.num_blocks = layout.num_blocks(num_tokens)
        self.offset = offset
        self.state = state
        self.opened_s = time.monotonic()
        self.changed = threading.Condition(store.lock)
        self._store = store
        self._num_layers = layout.num_layers
        self._layer_bytes = self.num_blocks * layout.row_bytes
        self._row_bytes = layout.row_bytes
        self._ready = [0] * layout.num_layers
        self._layers_left = layout.num_layers
        self.progress = 0
        self.end_told = False
        self._result = b""

    def __repr__(self) -> str:
        return f"<Publication {self.state!r} ready={self._ready}>"

    @property
    def outcome(self) -> Outcome | None:
        """How the handoff ended, or None: a writer may stop its work when it is not None."""
        return self.state.outcome

    @property
    def complete(self) -> bool:
        """Whether every row has been published."""
        return self._layers_left == 0

    @property
    def result(self) -> bytes:
        """What the engine leaves beside the KV: told to readers with the end of their load.

        Set it before the last row is published.

        Raises:
            LocalProtocolError: On setting more than ``messages.MAX_RESULT_BYTES``.
        """
        return self._result

    @result.setter
    def result(self, result: bytes) -> None:
        if len(result) > MAX_RESULT_BYTES:
            raise LocalProtocolError(
                f"handoff {self.handoff_id}: a result of {len(result)} bytes beside the KV, "
                f"at most {MAX_RESULT_BYTES} are told to readers"
            )
        self._result = result

    def rows(self, layer: int) -> npt.NDArray[np.uint8]:
        """Return the writable rows of one layer: uint8, shape ``(num_blocks, row_bytes)``.

        Raises:
            LocalProtocolError: The writer has let go (all published, or aborted), or no such
                layer exists.
        """
        if not 0 <= layer < self._num_layers:
            raise LocalProtocolError(f"layer {layer} is not within {self._num_layers} layers")
        with self._store.lock:
            if not self.state.writer_holds:
                raise LocalProtocolError(
                    f"handoff {self.handoff_id}: rows asked for after the writer let go"
                )
            flat = self._store.arena.view(self.row_offset(layer, 0), self._layer_bytes)
        return flat.reshape(self.num_blocks, self._row_bytes)

    def publish(self, layer: int, end_block: int) -> None:
        """Make rows ``[0, end_block)`` of ``layer`` readable, for good.

        The last row of the last layer completes the publication: the writer lets go. After the
        handoff has ended this only counts, so that the memory is freed at the end of writing.

        Raises:
            LocalProtocolError: Out of range, fewer rows than before, or after the writer let go.
        """
        if not 0 <= layer < self._num_layers or not 0 <= end_block <= self.num_blocks:
            raise LocalProtocolError(
                f"publish(layer={layer}, end_block={end_block}) is outside "
                f"{self._num_layers} layers of {self.num_blocks} blocks"
            )
        with self._store.lock:
            if not self.state.writer_holds:
                raise LocalProtocolError(
                    f"handoff {self.handoff_id}: published after the writer let go"
                )
            before = self._ready[layer]
            if end_block < before:
                raise LocalProtocolError(
                    f"layer {layer} has {before} readable blocks, cannot go back to {end_block}"
                )
            self._ready[layer] = end_block
            self.progress += 1
            self._store.published(self, (end_block - before) * self._row_bytes)
            if before < end_block == self.num_blocks:
                self._layers_left -= 1
            complete = self._layers_left == 0
            if complete:
                self.state.written(self._store.now_s())
            else:
                self.state.renew(self._store.now_s())
            self.changed.notify_all()
        if complete:
            self._store.settle(self, "published")

    def abort(self, reason: str) -> None:
        """End the handoff as failed and let go of the rows; idempotent, also after the end."""
        with self._store.lock:
            self.state.writer_gone(reason)
            self.changed.notify_all()
        self._store.settle(self)

    def row_offset(self, layer: int, block: int) -> int:
        """Return where one block row begins in the arena."""
        return self.offset + layer * self._layer_bytes + block * self._row_bytes

    def wait_ready(self, layer: int, end_block: int, wait_s: float) -> int:
        """Wait until rows ``[0, end_block)`` of ``layer`` are readable, at most ``wait_s``.

        Returns:
            How many consecutive layers from ``layer`` on are readable up to ``end_block``; 0 when
            the time is over.

        Raises:
            HandoffAborted: The handoff has ended.
        """
        with self._store.lock:
            if self._ready[layer] < end_block and not self.state.ended:
                self.changed.wait(wait_s)
            if self.state.ended:
                raise HandoffAborted(
                    self.handoff_id, f"{self.state.outcome} while being read: {self.state.detail}"
                )
            count = 0
            while layer + count < self._num_layers and self._ready[layer + count] >= end_block:
                count += 1
            if count:
                self.state.renew(self._store.now_s())
            return count


class PublicationStore:
    """Everything one prefill rank has staged. Thread-safe.

    Args:
        identity: What this rank says of itself.
        arena: Memory for the rows; the store closes it.
        policy: Lease, waits and bounds.
        secret: The fleet's shared secret.
        unpack: Turns packed rows into plain ones; needed when the layout's packing is not plain.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch.
        on_event: Told each step, outside of locks; what it raises is logged and dropped.
        sweeper: Whether a thread of the store ends handoffs whose lease has run out.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        arena: StagingArena,
        policy: HandoffPolicy,
        secret: bytes,
        unpack: Unpack | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_event: Callable[[HandoffEvent], None] | None = None,
        sweeper: bool = True,
    ) -> None:
        if identity.layout.packing != "plain" and unpack is None:
            raise LocalProtocolError(
                f"layout packing {identity.layout.packing!r} needs an unpack callback"
            )
        self.identity = identity
        self.arena = arena
        self.policy = policy
        self.secret = secret
        self.unpack = unpack
        self.now_s = clock
        self.wall_s = wall_clock
        self.lock = threading.RLock()
        self._freed = threading.Condition(self.lock)
        self._opened = threading.Condition(self.lock)
        self._on_event = on_event
        self._live: dict[str, Publication] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._outcomes: Counter[str] = Counter()
        self._refused_full = 0
        self._published_bytes = 0
        self._closed = threading.Event()
        self._sweeper = (
            threading.Thread(target=self._sweep_loop, name="disagg-leases", daemon=True)
            if sweeper
            else None
        )
        if self._sweeper is not None:
            self._sweeper.start()

    def open(
        self, ticket: Ticket, num_tokens: int, *, prompt: str = "", wait_s: float = 0.0
    ) -> Publication:
        """Take staging for ``num_tokens`` tokens and start the lease.

        Args:
            ticket: A ticket that ``tickets.verify`` has returned.
            num_tokens: Tokens that will be published.
            prompt: Digest of the prompt (``prompts.py``), told to readers with the offer.
            wait_s: How long to wait for staging when it is full; the adapter decides where
                waiting is harmless.

        Raises:
            StagingFull: The staging bound would be exceeded, also after ``wait_s``.
            LocalProtocolError: The handoff exists already, has ended, or has no tokens.
            AuthenticationError: The ticket has expired.
        """
        check_valid_at(ticket, self.wall_s())
        if num_tokens < 1:
            raise LocalProtocolError(f"a handoff of {num_tokens} tokens has nothing to publish")
        staged_bytes = self.identity.layout.staged_bytes(num_tokens)
        with self.lock:
            self._check_new(ticket.handoff_id)
            offset = self._allocate(ticket.handoff_id, staged_bytes, wait_s)
            try:
                self._check_new(ticket.handoff_id)
                state = HandoffState(
                    ticket.handoff_id,
                    lease_s=self.policy.lease_s,
                    now_s=self.now_s(),
                    readers_of=self._readers_of,
                )
                publication = Publication(self, state, num_tokens, offset, prompt)
            except BaseException:
                self.arena.free(offset)
                raise
            self._live[ticket.handoff_id] = publication
            self._opened.notify_all()
        self._tell(publication.handoff_id, "opened", tokens=num_tokens, bytes=staged_bytes)
        return publication

    def wait_open(self, handoff_id: str, wait_s: float) -> bool:
        """Wait at most ``wait_s`` for a handoff to be opened; True once it was, ended or not."""
        with self.lock:
            if not self._known(handoff_id):
                self._opened.wait(wait_s)
            return self._known(handoff_id)

    def _known(self, handoff_id: str) -> bool:
        return self._closed.is_set() or handoff_id in self._live or handoff_id in self._ended

    def find(self, handoff_id: str) -> Publication:
        """Return the live publication of ``handoff_id``.

        Raises:
            HandoffAborted: Unknown here, or already ended; the message says which.
        """
        with self.lock:
            publication = self._live.get(handoff_id)
            if publication is not None:
                return publication
            end = self._ended.get(handoff_id)
        raise HandoffAborted(
            handoff_id, f"already {end}" if end else "unknown to this publisher: never opened here"
        )

    def claim(self, handoff_id: str, decode_rank: int, decode_size: int) -> Publication:
        """Claim for one decode rank.

        Raises:
            HandoffAborted: Unknown, ended, claimed twice or not for this rank.
        """
        with self.lock:
            publication = self.find(handoff_id)
            publication.state.claim(decode_rank, decode_size, self.now_s())
        self._tell(publication.handoff_id, "claimed", decode_rank=decode_rank)
        return publication

    def consumed(self, publication: Publication, decode_rank: int) -> bool:
        """One reader is done; return False if the handoff had ended before."""
        with self.lock:
            held = publication.state.consumed(decode_rank, self.now_s())
        self.settle(publication)
        return held

    def failed(self, publication: Publication, detail: str) -> None:
        """One reader gave up: the handoff ends for all."""
        with self.lock:
            publication.state.fail(detail)
        self.settle(publication)

    def peer_gone(self, publication: Publication, decode_rank: int) -> None:
        """One reader's connection ended."""
        with self.lock:
            publication.state.peer_gone(decode_rank)
        self.settle(publication)

    def renew(self, publication: Publication) -> None:
        """Renew the lease: its reader shows life."""
        with self.lock:
            publication.state.renew(self.now_s())

    def sweep(self) -> int:
        """End every handoff whose lease has run out; return how many ended."""
        now_s = self.now_s()
        with self.lock:
            expired = [p for p in self._live.values() if p.state.expire(now_s)]
        for publication in expired:
            self.settle(publication)
        return len(expired)

    def stats(self) -> StoreStats:
        """Return a snapshot for metrics."""
        with self.lock:
            return StoreStats(
                states=Counter(str(p.state.state) for p in self._live.values()),
                outcomes=dict(self._outcomes),
                refused_full=self._refused_full,
                used_bytes=self.arena.used_bytes,
                peak_bytes=self.arena.peak_bytes,
                bound_bytes=self.arena.size_bytes,
                published_bytes=self._published_bytes,
            )

    def close(self) -> None:
        """End every handoff as failed, stop the sweeper, close the arena; idempotent.

        Close the listeners first. Rows of writers that have not let go stay mapped for them.
        """
        self._closed.set()
        if self._sweeper is not None and self._sweeper is not threading.current_thread():
            self._sweeper.join(timeout=5.0)
        with self.lock:
            publications = list(self._live.values())
            for publication in publications:
                publication.state.fail("the publisher is shutting down")
            self._freed.notify_all()
            self._opened.notify_all()
        for publication in publications:
            self.settle(publication)
        self.arena.close()

    def published(self, publication: Publication, num_bytes: int) -> None:
        """Count bytes made readable; called by the publication under the lock."""
        self._published_bytes += num_bytes

    def settle(self, publication: Publication, step: str | None = None) -> None:
        """Free what both holders have let go of, and tell what happened; exactly once each."""
        state = publication.state
        ended = False
        with self.lock:
            if state.ended and not publication.end_told:
                ended = publication.end_told = True
                self._remember(publication)
                publication.changed.notify_all()
            if state.releasable and self._live.get(publication.handoff_id) is publication:
                del self._live[publication.handoff_id]
                self.arena.free(publication.offset)
                self._freed.notify_all()
        if step is not None:
            self._tell(
                publication.handoff_id,
                step,
                tokens=publication.num_tokens,
                seconds=time.monotonic() - publication.opened_s,
            )
        if ended:
            self._tell(
                publication.handoff_id,
                str(state.outcome),
                problem=state.detail,
                seconds=time.monotonic() - publication.opened_s,
            )

    def _readers_of(self, decode_size: int) -> frozenset[int]:
        return readers_of(
            self.identity.tp_rank,
            prefill_size=self.identity.tp_size,
            decode_size=decode_size,
            num_kv_heads=self.identity.layout.num_kv_heads,
        )

    def _check_new(self, handoff_id: str) -> None:
        if self._closed.is_set():
            raise LocalProtocolError("the publication store is closed")
        if handoff_id in self._live or handoff_id in self._ended:
            end = self._ended.get(handoff_id, "open")
            raise LocalProtocolError(f"handoff {handoff_id} was opened before; it is {end}")

    def _allocate(self, handoff_id: str, staged_bytes: int, wait_s: float) -> int:
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                return self.arena.allocate(staged_bytes)
            except ArenaFull as exc:
                left_s = deadline_s - time.monotonic()
                hopeless = exc.wanted_bytes > self.arena.size_bytes
                if left_s > 0 and not hopeless and not self._closed.is_set():
                    self._freed.wait(left_s)
                    continue
                self._refused_full += 1
                raise StagingFull(
                    handoff_id,
                    wanted_bytes=exc.wanted_bytes,
                    free_bytes=exc.free_bytes,
                    bound_bytes=self.arena.size_bytes,
                ) from exc

    def _remember(self, publication: Publication) -> None:
        state = publication.state
        self._outcomes[str(state.outcome)] += 1
        self._ended[publication.handoff_id] = f"{state.outcome}: {state.detail}"
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def _sweep_loop(self) -> None:
        pause_s = min(SWEEP_INTERVAL_S, self.policy.lease_s / 4)
        while not self._closed.wait(pause_s):
            self.sweep()

    def _tell(self, handoff_id: HandoffId, step: str, **detail: str | int | float) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(HandoffEvent(handoff_id, step, self.wall_s(), detail))
        except Exception:
            logger.exception("on_event failed at step %s of handoff %s", step, handoff_id)
