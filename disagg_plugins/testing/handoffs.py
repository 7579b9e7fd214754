"""A publisher and a reader in one process, small enough for tests, with real sockets.

``World`` opens handoffs of random rows, loads them through a transport, and at its end checks that
no descriptor, thread or byte of staging was left behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.handoff.canonical import to_canonical
from disagg_plugins.handoff.endpoints import local_host_id
from disagg_plugins.handoff.interfaces import Endpoint, Identity, LoadReport
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
from disagg_plugins.handoff.publications import Publication, PublicationStore
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.handoff.shards import head_range
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.tickets import mint, new_handoff_id, verify
from disagg_plugins.policy import HandoffPolicy

if TYPE_CHECKING:
    import numpy.typing as npt

    from disagg_plugins.handoff.cancellation import Cancellation
    from disagg_plugins.handoff.interfaces import Listener, Transport, Unpack

SECRET = b"a secret for tests, 32 bytes long"
LAYERS, HEADS, HEAD_DIM = 3, 4, 8
FINGERPRINT = ModelFingerprint("model", "bfloat16", LAYERS, HEADS, HEAD_DIM, "none")
WAIT_S = 5.0
"""Bound on everything a test waits for."""


def quick_policy(**changes: object) -> HandoffPolicy:
    """Return a policy whose time-outs are short enough to be waited for."""
    values: dict[str, object] = {
        "staging_bytes": 1 << 20,
        "lease_s": 5.0,
        "connect_s": 1.0,
        "read_s": 1.0,
        "load_s": 3.0,
        **changes,
    }
    return HandoffPolicy.model_validate(values)


def rank_identity(
    name: str, tp_rank: int = 0, tp_size: int = 1, *, block_size_tokens: int = 16, **layout: object
) -> Identity:
    """Return the identity of one rank of the test model."""
    first, end = head_range(tp_rank, tp_size, HEADS)
    plain = KVLayout(LAYERS, HEADS, first, end - first, HEAD_DIM, "bfloat16", block_size_tokens)
    changed = replace(plain, **layout)  # type: ignore[arg-type]
    return Identity(f"{name}/{tp_rank}", FINGERPRINT, changed, tp_rank, tp_size)


def wait_until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    """Wait for ``condition``; raise ``TimeoutError`` naming ``what`` if it does not come."""
    deadline_s = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() >= deadline_s:
            raise TimeoutError(f"{what} did not happen within {within_s:g} s")
        pause.wait(0.005)


def open_descriptors() -> int:
    """Return how many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


@dataclass
class RecordingSink:
    """Keeps what it is given; ``fail_at`` raises at that layer."""

    native: dict[tuple[int, int], bytes] = field(default_factory=dict)
    canonical: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
    fail_at: int | None = None

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Keep rows."""
        self._maybe_fail(layer)
        self.native[layer, first_block] = bytes(rows)

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Keep canonical KV."""
        self._maybe_fail(layer)
        self.canonical[layer, first_token, first_head] = bytes(kv)

    @property
    def empty(self) -> bool:
        """Whether nothing was written."""
        return not self.native and not self.canonical

    def has_layers(self, count: int) -> bool:
        """Return whether something of ``count`` layers has arrived."""
        return len({key[0] for key in [*self.native, *self.canonical]}) == count

    def layer(self, layer: int) -> bytes:
        """Return everything of one layer in order."""
        pieces = self.native or self.canonical
        return b"".join(data for key, data in sorted(pieces.items()) if key[0] == layer)

    def _maybe_fail(self, layer: int) -> None:
        if layer == self.fail_at:
            raise RuntimeError("the sink failed on purpose")


@dataclass
class Opened:
    """One handoff of a ``World``."""

    handoff_id: str
    ticket: str
    publications: list[Publication]
    rows: list[npt.NDArray[np.uint8]]

    def publish(self, layers: Sequence[int] = range(LAYERS)) -> None:
        """Make whole layers readable on every rank."""
        for publication in self.publications:
            for layer in layers:
                publication.publish(layer, publication.num_blocks)

    def canonical(
        self, store: PublicationStore, rank: int, layer: int, first: int, end: int
    ) -> bytes:
        """Return what canonical reading of one rank's heads must deliver."""
        layout = store.identity.layout
        heads = (layout.head_start, layout.head_start + layout.num_kv_heads_local)
        return to_canonical(
            self.rows[rank][layer],
            layout,
            first_token=first,
            num_tokens=end - first,
            first_head=heads[0],
            end_head=heads[1],
        ).tobytes()


class World:
    """A prefill worker of ``prefill_size`` ranks behind one transport.

    Args:
        transports: Name -> transport.
        policy: For both sides.
        prefill_size: Ranks of the prefill worker.
        unpack: Turns packed rows into plain ones, for a packed layout.
        layout: Changes to its layout.
    """

    def __init__(
        self,
        transports: Mapping[str, Transport],
        *,
        policy: HandoffPolicy | None = None,
        prefill_size: int = 1,
        unpack: Unpack | None = None,
        **layout: object,
    ) -> None:
        self._unpack = unpack
        self._descriptors = open_descriptors()
        self._threads = set(threading.enumerate())
        self.transports = dict(transports)
        self.policy = policy or quick_policy()
        self.policy = self.policy.model_copy(update={"transports": list(transports)})
        self.stores: list[PublicationStore] = []
        self.listeners: list[Listener] = []
        self.endpoints: list[Endpoint] = []
        self.readers: list[HandoffReader] = []
        self._random = np.random.default_rng(7)
        for rank in range(prefill_size):
            self._start_rank(rank, prefill_size, layout)

    @property
    def store(self) -> PublicationStore:
        """The store of rank 0."""
        return self.stores[0]

    def open(
        self, num_tokens: int = 40, *, publish: bool = True, handoff_id: str | None = None
    ) -> Opened:
        """Open a handoff of random rows on every rank."""
        handoff_id = handoff_id or new_handoff_id()
        ticket = self.ticket(handoff_id)
        publications, all_rows = [], []
        for store in self.stores:
            publication = store.open(verify(SECRET, ticket, time.time()), num_tokens)
            shape = (LAYERS, publication.num_blocks, store.identity.layout.row_bytes)
            rows = self._random.integers(0, 256, shape, dtype=np.uint8)
            for layer in range(LAYERS):
                publication.rows(layer)[:] = rows[layer]
            publications.append(publication)
            all_rows.append(rows)
        opened = Opened(handoff_id, ticket, publications, all_rows)
        if publish:
            opened.publish()
        return opened

    def ticket(self, handoff_id: str, secret: bytes = SECRET, valid_s: float = 60.0) -> str:
        """Return a ticket for ``handoff_id``; a negative validity makes an expired one."""
        return mint(
            secret,
            handoff_id=handoff_id,
            prefill="prefill",
            decode="decode",
            now_s=time.time(),
            valid_s=valid_s,
        )

    def reader(
        self,
        identity: Identity | None = None,
        *,
        secret: bytes = SECRET,
        policy: HandoffPolicy | None = None,
    ) -> HandoffReader:
        """Return a reader; the world closes it."""
        reader = HandoffReader(
            identity=identity or rank_identity("decode"),
            transports=self.transports,
            policy=policy or self.policy,
            secret=secret,
        )
        self.readers.append(reader)
        return reader

    def load(
        self,
        opened: Opened,
        sink: RecordingSink,
        *,
        reader: HandoffReader | None = None,
        first_token: int = 0,
        end_token: int = 40,
        ticket: str | None = None,
        cancellation: Cancellation | None = None,
    ) -> LoadReport:
        """Load tokens of a handoff."""
        return (reader or self.reader()).load(
            opened.handoff_id,
            opened.ticket if ticket is None else ticket,
            self.endpoints,
            first_token=first_token,
            end_token=end_token,
            sink=sink,
            cancellation=cancellation,
        )

    def outcomes(self) -> dict[str, int]:
        """Return how the handoffs of all ranks ended so far."""
        total: dict[str, int] = {}
        for store in self.stores:
            for outcome, count in store.stats().outcomes.items():
                total[outcome] = total.get(outcome, 0) + count
        return total

    def close(self) -> None:
        """Close everything and check that nothing is left.

        Raises:
            TimeoutError: Staging, a thread or a descriptor was left behind.
        """
        for reader in self.readers:
            reader.close()
        for listener in self.listeners:
            listener.close()
        for store in self.stores:
            store.close()
        for store in self.stores:
            live = [p for p in store.stats().states.items() if p[1]]
            if store.arena.used_bytes and not live:
                raise TimeoutError(f"{store.arena.used_bytes} bytes of staging were left")
        wait_until(lambda: set(threading.enumerate()) <= self._threads, "the end of every thread")
        wait_until(
            lambda: open_descriptors() <= self._descriptors, "the closing of every descriptor"
        )

    def _start_rank(self, rank: int, size: int, layout: Mapping[str, object]) -> None:
        identity = rank_identity("prefill", rank, size, **layout)  # type: ignore[arg-type]
        store = PublicationStore(
            identity=identity,
            arena=StagingArena(self.policy.staging_bytes),
            policy=self.policy,
            secret=SECRET,
            unpack=self._unpack,
        )
        self.stores.append(store)
        addresses = {}
        for name, transport in self.transports.items():
            listener = transport.listen(store, identity, secret=SECRET, policy=self.policy)
            self.listeners.append(listener)
            addresses[name] = listener.address
        self.endpoints.append(Endpoint(rank, size, local_host_id(), addresses))
