"""The publisher's process of the ``handoff`` benchmark: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import resource
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "adapters", ROOT / "connectors"):
    sys.path.insert(0, str(folder))

import numpy as np  # noqa: E402

from disagg_kv_shm import ShmTransport  # noqa: E402
from disagg_kv_tcp import TcpTransport  # noqa: E402
from disagg_plugins.handoff.interfaces import Identity  # noqa: E402
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint  # noqa: E402
from disagg_plugins.handoff.publications import PublicationStore  # noqa: E402
from disagg_plugins.handoff.staging import StagingArena  # noqa: E402
from disagg_plugins.handoff.tickets import verify  # noqa: E402
from disagg_plugins.policy import HandoffPolicy  # noqa: E402

SECRET = b"benchmark-secret-not-for-real-use"
PAYLOAD_BYTES = 128 << 20
"""One handoff: 1,024 tokens of a model with 128 KiB a token (Llama 3 8B), and several times the
last-level cache, so nothing is measured that fits into it."""


def geometry(block_bytes: int) -> tuple[int, int]:
    """Return (layers, blocks of one layer) of a handoff of ``PAYLOAD_BYTES``."""
    blocks = PAYLOAD_BYTES // block_bytes
    layers = min(blocks, 16)
    return layers, blocks // layers


def identity(name: str, block_bytes: int) -> Identity:
    """Return an identity whose block rows have ``block_bytes`` bytes."""
    layers, _ = geometry(block_bytes)
    tokens = block_bytes // (2 * 2 * 64 * 2)
    return Identity(
        name,
        ModelFingerprint("benchmark", "bfloat16", layers, 2, 64, "none"),
        KVLayout(layers, 2, 0, 2, 64, "bfloat16", tokens),
    )


def policy() -> HandoffPolicy:
    """Return the defaults with only the staging that one handoff needs, and room for two."""
    return HandoffPolicy(staging_bytes=2 * PAYLOAD_BYTES)


def cpu_s() -> float:
    """Return user and system seconds of this process, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss_bytes() -> int:
    """Return resident bytes of this process, shared pages included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peer:
    """Publishes handoffs of one geometry at a time, and sends raw bytes for comparison."""

    def __init__(self) -> None:
        self.source = np.empty(PAYLOAD_BYTES, dtype=np.uint8)
        self.source.reshape(-1, 4096)[:] = (np.arange(PAYLOAD_BYTES // 4096) % 251)[:, None]
        self.store: PublicationStore | None = None
        self.listeners: list[object] = []
        self.raw_listener = socket.create_server(("127.0.0.1", 0))
        self.raw: socket.socket | None = None

    def size(self, block_bytes: int) -> dict[str, object]:
        """Serve handoffs of another block size; fill the staging memory once."""
        self.close()
        self.block_bytes = block_bytes
        ours = identity("publisher", block_bytes)
        bound = policy()
        self.store = PublicationStore(
            identity=ours, arena=StagingArena(bound.staging_bytes), policy=bound, secret=SECRET
        )
        self.store.arena.view(0, PAYLOAD_BYTES)[:] = self.source
        self.listeners = [
            t.listen(self.store, ours, secret=SECRET, policy=bound)
            for t in (ShmTransport(), TcpTransport())
        ]
        shm, tcp = (listener.address for listener in self.listeners)
        return {"shm": shm, "tcp": tcp, "raw": self.raw_listener.getsockname()[1]}

    def open(self, ticket: str, copy_in: bool, tokens: int) -> dict[str, object]:
        """Publish one handoff; ``copy_in`` also copies the rows into staging, as an engine does."""
        publication = self.store.open(verify(SECRET, ticket, time.time()), tokens)
        layers = self.store.identity.layout.num_layers
        layer_bytes = PAYLOAD_BYTES // layers
        for layer in range(layers):
            if copy_in:
                rows = publication.rows(layer)
                start = layer * layer_bytes
                np.copyto(rows, self.source[start : start + rows.nbytes].reshape(rows.shape))
            publication.publish(layer, publication.num_blocks)
        return {}

    def raw_accept(self) -> dict[str, object]:
        """Accept the raw connection."""
        self.raw, _ = self.raw_listener.accept()
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {}

    def raw_send(self) -> dict[str, object]:
        """Send one payload block by block."""
        view = memoryview(self.source)
        for start in range(0, PAYLOAD_BYTES, self.block_bytes):
            self.raw.sendall(view[start : start + self.block_bytes])
        return {}

    def close(self) -> None:
        """Close the store and its listeners."""
        for listener in self.listeners:
            listener.close()
        self.listeners = []
        if self.store is not None:
            self.store.close()
        self.store = None
        if self.raw is not None:
            self.raw.close()
        self.raw = None


def main() -> None:
    """Serve commands until the input ends."""
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("cmd")
        if name == "usage":
            answer: dict[str, object] = {"cpu_s": cpu_s(), "rss_bytes": rss_bytes()}
        else:
            answer = getattr(peer, name)(**command)
        print(json.dumps(answer), flush=True)
    peer.close()
    peer.raw_listener.close()


if __name__ == "__main__":
    main()
