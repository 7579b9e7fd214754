"""Cases of the ``handoff`` benchmark between unlike layouts, and the process that publishes them.

A handoff of Llama 3 8B's shape: 32 layers, 8 KV heads of 128, 128 MiB in all. One side stages rows
as vLLM does (``hctd``, blocks of 128 or 16 tokens, plain or permuted inside a block), the other as
SGLang does (``cthd``, pages of one token); readers write with the adapters' own code into pools in
which a request's pages lie scattered. ``direct`` is the same reader loading from a publisher of its
own layout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from handoff_peer import PAYLOAD_BYTES, SECRET, cpu_s, policy

from disagg_kv_shm import ShmTransport  # isort: skip
from disagg_kv_tcp import TcpTransport  # isort: skip
from disagg_plugins.handoff.canonical import from_canonical, rows_as_canonical, to_canonical  # isort: skip
from disagg_plugins.handoff.endpoints import local_host_id  # isort: skip
from disagg_plugins.handoff.interfaces import Endpoint, Identity  # isort: skip
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint  # isort: skip
from disagg_plugins.handoff.publications import PublicationStore  # isort: skip
from disagg_plugins.handoff.reader import HandoffReader  # isort: skip
from disagg_plugins.handoff.staging import StagingArena  # isort: skip
from disagg_plugins.handoff.tickets import mint, new_handoff_id, verify  # isort: skip
from disagg_sglang.pools import HostPool, PageSink  # isort: skip
from disagg_vllm.caches import HostCaches  # isort: skip
from disagg_vllm.host_port import HostPort  # isort: skip
from disagg_vllm.packing import Packing, packing_from_index  # isort: skip
from disagg_vllm.worker_side import BlockSink  # isort: skip

LAYERS, HEADS, HEAD_DIM = 32, 8, 128
TRANSPORTS = {"shm": ShmTransport, "tcp": TcpTransport}
SIDES = ("vllm-128", "vllm-16", "vllm-128-packed", "vllm-16-packed")


@dataclass(frozen=True, slots=True)
class Case:
    """One pair of layouts.

    Attributes:
        publisher: ``sglang``, or ``vllm-BLOCK`` with ``-packed`` where rows are permuted.
        reader: The same for the reader.
        dtype: Of the KV.
        tp_size: Ranks of the publisher; the reader has one.
    """

    publisher: str
    reader: str
    dtype: str
    tp_size: int = 1

    def __str__(self) -> str:
        tp = f" TP {self.tp_size}->1" if self.tp_size > 1 else ""
        return f"{self.publisher} -> {self.reader} {self.dtype}{tp}"


def cases() -> list[Case]:
    """Return every pair, both ways."""
    found = []
    for dtype in ("bfloat16", "float32"):
        for side in SIDES:
            found += [Case(side, "sglang", dtype), Case("sglang", side, dtype)]
    found.append(Case("vllm-128", "sglang", "bfloat16", 2))
    found.append(Case("sglang", "vllm-128", "bfloat16", 2))
    return found


def layout_of(side: str, dtype: str, tp_rank: int = 0, tp_size: int = 1) -> KVLayout:
    """Return the layout of one rank of a side."""
    heads = HEADS // tp_size
    common = (LAYERS, HEADS, tp_rank * heads, heads, HEAD_DIM, dtype)
    if side == "sglang":
        return KVLayout(*common, 1, order="cthd")
    block = int(side.split("-")[1])
    packing = packing_of(side, dtype)
    return KVLayout(*common, block, order="hctd", packing=packing.name if packing else "plain")


def packing_of(side: str, dtype: str) -> Packing | None:
    """Return how vLLM 0.32 permutes a block of one head: ``amx`` or, in float32, ``vec``.

    Found by ``discover_packing`` on a Xeon; K then V, ``t`` and ``d`` cut where it cuts them.
    """
    if not side.endswith("packed"):
        return None
    block = int(side.split("-")[1])
    plain = np.arange(2 * block * HEAD_DIM).reshape(2, block, HEAD_DIM)
    if dtype == "float32":
        key, value = plain[0].T, plain[1]
    else:
        key = plain[0].reshape(block // 16, 16, HEAD_DIM // 2, 2).transpose(0, 2, 1, 3)
        value = plain[1].reshape(block // 2, 2, HEAD_DIM // 16, 16).transpose(2, 0, 3, 1)
    return packing_from_index("benchmark", np.concatenate([key.ravel(), value.ravel()]))


def num_tokens(layout: KVLayout) -> int:
    """Return the tokens of ``PAYLOAD_BYTES``."""
    return PAYLOAD_BYTES // (LAYERS * layout.canonical_bytes(1, HEADS))


def canonical_layer(layout: KVLayout, layer: int) -> np.ndarray:
    """Return what a layer holds: bytes of ``[2, tokens, HEADS, HEAD_DIM]``."""
    num_bytes = layout.canonical_bytes(num_tokens(layout), HEADS)
    return np.random.default_rng(layer).integers(0, 256, num_bytes, dtype=np.uint8)


def identity_of(name: str, layout: KVLayout, tp_rank: int = 0, tp_size: int = 1) -> Identity:
    """Return what a rank says of itself."""
    model = ModelFingerprint("benchmark", layout.dtype, LAYERS, HEADS, HEAD_DIM, "none")
    return Identity(name, model, layout, tp_rank, tp_size)


# The publisher's process ------------------------------------------------------------------------


class Publisher:
    """One worker whose rows lie in staging already, of any number of ranks."""

    def __init__(self, side: str, dtype: str, tp_size: int) -> None:
        packing = packing_of(side, dtype)
        self.stores, self.listeners, self.addresses = [], [], []
        for rank in range(tp_size):
            layout = layout_of(side, dtype, rank, tp_size)
            ours = identity_of(f"{side} {rank}", layout, rank, tp_size)
            # The port without caches: only its way of unpacking is wanted.
            port = HostPort(None, layout, packing) if packing else None
            store = PublicationStore(
                identity=ours,
                arena=StagingArena(PAYLOAD_BYTES // tp_size),
                policy=policy(),
                secret=SECRET,
                unpack=port.unpack if port else None,
            )
            self._fill(store.arena, layout, packing)
            listeners = {
                name: make().listen(store, ours, secret=SECRET, policy=policy())
                for name, make in TRANSPORTS.items()
            }
            self.stores.append(store)
            self.listeners += listeners.values()
            self.addresses.append({name: each.address for name, each in listeners.items()})
        self.tokens = num_tokens(layout)

    def _fill(self, arena: StagingArena, layout: KVLayout, packing: Packing | None) -> None:
        blocks = layout.num_blocks(num_tokens(layout))
        size = blocks * layout.row_bytes
        start, end = layout.head_start, layout.head_start + layout.num_kv_heads_local
        for layer in range(LAYERS):
            rows = arena.view(layer * size, size).reshape(blocks, layout.row_bytes)
            kv = canonical_layer(layout, layer).reshape(
                -1, HEADS, layout.canonical_bytes(1, 1) // 2
            )
            part = np.ascontiguousarray(kv[:, start:end]).reshape(-1)
            from_canonical(part, rows, layout, first_token=0, first_head=start, end_head=end)
            if packing is not None:
                heads = rows.view(np.uint32 if layout.element_bytes == 4 else np.uint16)
                heads = heads.reshape(-1, len(packing.plain_index))
                heads[:] = packing.pack(heads)

    def open(self, ticket: str) -> None:
        """Publish every rank's part of one handoff."""
        for store in self.stores:
            publication = store.open(verify(SECRET, ticket, time.time()), self.tokens)
            for layer in range(LAYERS):
                publication.publish(layer, publication.num_blocks)

    def close(self) -> None:
        """Stop serving."""
        for each in (*self.listeners, *self.stores):
            each.close()


def serve() -> None:
    """Serve commands, JSON lines in and out, until the input ends."""
    publishers: dict[str, Publisher] = {}
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("cmd")
        answer: dict[str, object] = {}
        if name == "start":
            which = command.pop("which")
            publishers[which] = Publisher(**command)
            answer = {"addresses": publishers[which].addresses}
        elif name == "open":
            publishers[command["which"]].open(command["ticket"])
        elif name == "stop":
            for each in publishers.values():
                each.close()
            publishers.clear()
        else:
            answer = {"cpu_s": cpu_s()}
        print(json.dumps(answer), flush=True)
    for each in publishers.values():
        each.close()


# The reader -------------------------------------------------------------------------------------


class NumpyCaches(HostCaches):
    """vLLM's caches without torch."""

    def __init__(self, layers: Sequence[np.ndarray]) -> None:
        self._rows = list(layers)

    def rows(self, layer: int) -> np.ndarray:
        """Return every block of a layer."""
        return self._rows[layer]


class PlainPort(HostPort):
    """Blocks that hold plain rows, which no port of the adapter has in host memory."""

    def write_canonical(
        self, layer: int, block_ids: Sequence[int], first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Copy canonical KV that starts at the first token of ``block_ids[0]``."""
        layout, heads = self._layout, end_head - first_head
        target = rows_as_canonical(self._caches.rows(layer), layout)
        source = np.frombuffer(kv, target.dtype)
        source = source.reshape(2, -1, layout.block_size_tokens, heads, layout.head_dim)
        target[:, block_ids, :, first_head:end_head] = source


class NumpyPool(HostPool):
    """SGLang's pages without torch."""

    def __init__(self, layers: Sequence[np.ndarray], layout: KVLayout) -> None:
        self.layout = layout
        self._page_bytes = layout.row_bytes // 2
        page = np.dtype((np.void, self._page_bytes))
        halves = [each.reshape(-1).view(page).reshape(2, -1) for each in layers]
        self._layers = [(each[0], each[1]) for each in halves]


class Target:
    """A reader's pool with room for one request, in pages of random order.

    Args:
        side: Whose layout.
        dtype: Of the KV.
        memory: ``PAYLOAD_BYTES``, warm.
    """

    def __init__(self, side: str, dtype: str, memory: np.ndarray) -> None:
        self.layout = layout = layout_of(side, dtype)
        self.tokens = num_tokens(layout)
        self.layers = memory.reshape(LAYERS, -1, layout.row_bytes)
        self.ids = np.random.default_rng(5).permutation(layout.num_blocks(self.tokens))
        self.packing = packing_of(side, dtype)
        if side == "sglang":
            pool = NumpyPool(self.layers, layout)
            self.sink: Callable[[], Any] = lambda: PageSink(pool, self.ids, 0)
        else:
            caches, block_ids = NumpyCaches(self.layers), self.ids.tolist()
            plain = packing_from_index("none", np.arange(layout.row_bytes // layout.element_bytes))
            port = (
                HostPort(caches, layout, self.packing)
                if self.packing
                else PlainPort(caches, layout, plain)
            )
            self.sink = lambda: BlockSink(port, layout, block_ids)

    def check(self) -> None:
        """Raise unless the last handoff arrived whole; forget it."""
        layout = self.layout
        for layer, rows in enumerate(self.layers):
            if layout.order == "cthd":
                halves = rows.reshape(2, -1, layout.row_bytes // 2)
                found = halves[:, self.ids].reshape(-1)
            else:
                found = rows[self.ids]
                if self.packing is not None:
                    heads = found.view(np.uint32 if layout.element_bytes == 4 else np.uint16)
                    heads = heads.reshape(-1, len(self.packing.plain_index))
                    found = self.packing.unpack(heads).view(np.uint8).reshape(found.shape)
                found = to_canonical(
                    found,
                    layout,
                    first_token=0,
                    num_tokens=self.tokens,
                    first_head=0,
                    end_head=HEADS,
                )
            if not np.array_equal(found, canonical_layer(layout, layer)):
                raise RuntimeError(f"layer {layer} arrived damaged")
            rows[:] = 255


class CanonicalBench:
    """One case after the other.

    Args:
        peer: The publisher's process.
        memory: ``PAYLOAD_BYTES``, warm, to load into.
    """

    def __init__(self, peer: Any, memory: np.ndarray) -> None:
        self._peer = peer
        self._memory = memory
        self._readers: list[HandoffReader] = []

    def start(self, case: Case) -> dict[str, Callable[[], None]]:
        """Return name -> a function that moves one payload; the last case is given up."""
        self.close()
        self.target = Target(case.reader, case.dtype, self._memory)
        found: dict[str, Callable[[], None]] = {}
        for which, side, tp_size in (
            ("canonical", case.publisher, case.tp_size),
            ("direct", case.reader, 1),
        ):
            answer = self._peer.ask(
                "start", which=which, side=side, dtype=case.dtype, tp_size=tp_size
            )
            endpoints = [
                Endpoint(rank, tp_size, local_host_id(), addresses)
                for rank, addresses in enumerate(answer["addresses"])
            ]
            for name, make in TRANSPORTS.items():
                reader = HandoffReader(
                    identity=identity_of("reader", self.target.layout),
                    transports={name: make()},
                    policy=policy(),
                    secret=SECRET,
                )
                self._readers.append(reader)
                found[f"{name} {which}"] = partial(self._load, reader, which, endpoints)
        return found

    def _load(self, reader: HandoffReader, which: str, endpoints: list[Endpoint]) -> None:
        handoff_id = new_handoff_id()
        ticket = mint(
            SECRET, handoff_id=handoff_id, prefill="p", decode="d", now_s=time.time(), valid_s=60
        )
        self._peer.ask("open", which=which, ticket=ticket)
        report = reader.load(
            handoff_id,
            ticket,
            endpoints,
            first_token=0,
            end_token=self.target.tokens,
            sink=self.target.sink(),
        )
        if report.form != ("native" if which == "direct" else "canonical"):
            raise RuntimeError(f"{which} moved {report.form} KV")

    def close(self) -> None:
        """Close the readers and what the peer publishes."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
        self._peer.ask("stop")


if __name__ == "__main__":
    serve()
