"""What moving KV costs: ``shm`` and ``tcp`` against a memcpy, raw sockets and NIXL.

Two processes; payloads of 128 MiB, warm memory on both sides, cut into blocks of 16 KiB to 16 MiB.
Each figure is the median of interleaved repetitions. ``GB/CPU-s`` divides by user and system
seconds of *both* processes: on a worker that computes, that is what moving KV takes away.

What is included: ``shm`` and ``tcp`` run whole handoffs (ticket, open, claim, read, copy of every
block to private memory, end) through the real store, listener and reader. The publisher's copy
into staging is the engine's gather and is not, except in the row ``shm_with_copy_in``. ``raw``
receives straight into the private memory; NIXL reads straight into it.

Then handoffs between unlike layouts, vLLM's and SGLang's: what the canonical path costs against the
direct one into the same pool (``handoff_canonical.py``).

    python tests/benchmarks/handoff.py [--repetitions 7] [--nixl-python PATH] [--handoffs 1000]
    python tests/benchmarks/handoff.py --block-bytes --handoffs 0 --cases vllm-128  # only these
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from handoff_canonical import CanonicalBench, Case, cases
from handoff_peer import (
    PAYLOAD_BYTES,
    SECRET,
    cpu_s,
    geometry,
    identity,
    policy,
    rss_bytes,
)

from disagg_kv_shm import ShmTransport  # isort: skip
from disagg_kv_tcp import TcpTransport  # isort: skip
from disagg_plugins.handoff.endpoints import local_host_id  # isort: skip
from disagg_plugins.handoff.interfaces import Endpoint  # isort: skip
from disagg_plugins.handoff.reader import HandoffReader  # isort: skip
from disagg_plugins.handoff.tickets import mint, new_handoff_id  # isort: skip

KIB, MIB = 1 << 10, 1 << 20
BLOCK_BYTES = (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
ROUNDS = 2
"""Payloads in one measurement: 256 MiB, long enough for the kernel's CPU accounting."""

NIXL_PAUSES_S = {"nixl_spin": 0.0, "nixl_sleep": 0.0002}
HERE = Path(__file__).resolve().parent


class Process:
    """A child that answers one JSON line to each."""

    def __init__(self, *command: str, mark: str = "") -> None:
        self._mark = mark
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def tell(self, cmd: str, **arguments: object) -> None:
        """Send a command without waiting for the answer."""
        self.child.stdin.write(json.dumps({"cmd": cmd, **arguments}) + "\n")
        self.child.stdin.flush()

    def answer(self) -> dict[str, object]:
        """Return the next answer."""
        for line in self.child.stdout:
            if line.startswith(self._mark):
                return json.loads(line.removeprefix(self._mark))
        raise RuntimeError(f"the child ended with status {self.child.wait()}")

    def ask(self, cmd: str, **arguments: object) -> dict[str, object]:
        """Send a command and return its answer."""
        self.tell(cmd, **arguments)
        return self.answer()

    def close(self) -> None:
        """End the child."""
        self.child.stdin.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


def warm_pages(num_bytes: int, value: int) -> np.ndarray:
    """Return private memory, page-aligned and in huge pages where the kernel gives them.

    numpy's own large arrays start 16 bytes into a page. Engines' tensors do not (torch aligns to
    64 bytes), and copying between pages that are 16 bytes apart costs up to a fifth more here.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[:] = value
    return array


class CopySink:
    """Copies every block row to private memory, block by block, as a paged cache needs it."""

    def __init__(self, target: np.ndarray, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.target = memoryview(target)
        self.layer_bytes = PAYLOAD_BYTES // geometry(block_bytes)[0]

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Copy the rows."""
        size, target = self.block_bytes, self.target
        start = layer * self.layer_bytes + first_block * size
        for offset in range(0, len(rows), size):
            target[start + offset : start + offset + size] = rows[offset : offset + size]

    def native_targets(self, layer: int, first_block: int, num_blocks: int) -> list[memoryview]:
        """Return where the rows belong, for transports that receive bytes."""
        size, target = self.block_bytes, self.target
        start = layer * self.layer_bytes + first_block * size
        return [target[o : o + size] for o in range(start, start + num_blocks * size, size)]

    def write_canonical(self, *_: object) -> None:
        """Refuse: the layouts are equal here."""
        raise RuntimeError("canonical bytes between equal layouts")


class Bench:
    """All contenders at one block size after the other."""

    def __init__(self, nixl_python: str | None) -> None:
        self.target = warm_pages(PAYLOAD_BYTES, 255)
        self.source = warm_pages(PAYLOAD_BYTES, 7)
        self.peer = Process(sys.executable, str(HERE / "handoff_peer.py"))
        self.reader: HandoffReader | None = None
        self.raw: socket.socket | None = None
        self.nixl: tuple[Process, Process] | None = None
        self.nixl_problem: str | None = None
        try:
            self.nixl = _start_nixl(nixl_python)
        except (RuntimeError, OSError) as exc:
            self.nixl_problem = str(exc)

    def size(self, block_bytes: int) -> None:
        """Prepare every contender for another block size."""
        self.block_bytes = block_bytes
        self._close_size()
        answer = self.peer.ask("size", block_bytes=block_bytes)
        addresses = {"shm": str(answer["shm"]), "tcp": str(answer["tcp"])}
        self.endpoint = Endpoint(0, 1, local_host_id(), addresses)
        self.tokens = geometry(block_bytes)[1] * identity("x", block_bytes).layout.block_size_tokens
        self.readers = {
            name: HandoffReader(
                identity=identity("reader", block_bytes),
                transports={name: transport},
                policy=policy(),
                secret=SECRET,
            )
            for name, transport in (("shm", ShmTransport()), ("tcp", TcpTransport()))
        }
        self.peer.tell("raw_accept")
        self.raw = socket.create_connection(("127.0.0.1", int(answer["raw"])))
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer.answer()
        if self.nixl is not None:
            self.nixl[0].ask("size", block_bytes=block_bytes)
        view, source = memoryview(self.target), memoryview(self.source)
        starts = range(0, PAYLOAD_BYTES, block_bytes)
        self.pieces = [
            (
                np.frombuffer(view[s : s + block_bytes], np.uint8),
                np.frombuffer(source[s : s + block_bytes], np.uint8),
            )
            for s in starts
        ]

    def contenders(self) -> dict[str, Callable[[], None]]:
        """Return name -> a function that moves one payload."""
        found: dict[str, Callable[[], None]] = {
            "memcpy": self.memcpy,
            "shm": lambda: self.handoff("shm"),
            "shm_with_copy_in": lambda: self.handoff("shm", copy_in=True),
            "tcp": lambda: self.handoff("tcp"),
            "raw": self.raw_sockets,
        }
        if self.nixl is not None:
            for name, pause_s in NIXL_PAUSES_S.items():
                found[name] = lambda pause_s=pause_s: self.nixl_read(pause_s)
        return found

    def memcpy(self) -> None:
        """Copy block by block within this process."""
        for target, source in self.pieces:
            np.copyto(target, source)

    def handoff(self, transport: str, *, copy_in: bool = False, tokens: int | None = None) -> None:
        """Run one whole handoff, of the whole payload or of fewer tokens."""
        tokens = tokens or self.tokens
        handoff_id = new_handoff_id()
        ticket = mint(
            SECRET, handoff_id=handoff_id, prefill="p", decode="d", now_s=time.time(), valid_s=60
        )
        self.peer.ask("open", ticket=ticket, copy_in=copy_in, tokens=tokens)
        self.readers[transport].load(
            handoff_id,
            ticket,
            [self.endpoint],
            first_token=0,
            end_token=tokens,
            sink=CopySink(self.target, self.block_bytes),
        )

    def raw_sockets(self) -> None:
        """Receive one payload that the peer sends block by block."""
        self.peer.tell("raw_send")
        view = memoryview(self.target)
        for start in range(0, PAYLOAD_BYTES, self.block_bytes):
            got, end = start, start + self.block_bytes
            while got < end:
                got += self.raw.recv_into(view[got:end])
        self.peer.answer()

    def nixl_read(self, pause_s: float) -> None:
        """Let NIXL read one payload."""
        initiator, target = self.nixl
        initiator.ask("read", pause_s=pause_s)

    def measure(self, name: str, move: Callable[[], None]) -> tuple[float, float]:
        """Return wall and CPU seconds of ``ROUNDS`` payloads."""
        others = list(self.nixl) if name.startswith("nixl") else [self.peer]
        before = sum(float(p.ask("usage")["cpu_s"]) for p in others)
        cpu, wall = cpu_s(), time.perf_counter()
        for _ in range(ROUNDS):
            move()
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        cpu += sum(float(p.ask("usage")["cpu_s"]) for p in others) - before
        if name.startswith("nixl"):
            self.nixl[1].ask("drain")
        return wall, cpu

    def check(self) -> None:
        """Raise unless the last payload arrived whole."""
        pages = self.target.reshape(-1, 4096)
        if not (pages == (np.arange(len(pages)) % 251)[:, None]).all():
            raise RuntimeError("the payload arrived damaged")
        self.target[:] = 255

    def flat_memory(self, handoffs: int) -> dict[str, int]:
        """Run many handoffs of 16 MiB; return resident bytes of both processes."""
        self.size(MIB)
        tokens = identity("x", MIB).layout.block_size_tokens
        for _ in range(20):
            self.handoff("shm", tokens=tokens)
            self.handoff("tcp", tokens=tokens)
        first = (rss_bytes(), int(self.peer.ask("usage")["rss_bytes"]))
        for index in range(handoffs):
            self.handoff("shm" if index % 2 else "tcp", tokens=tokens)
        last = (rss_bytes(), int(self.peer.ask("usage")["rss_bytes"]))
        return {
            "handoffs": handoffs,
            "reader_first_bytes": first[0],
            "reader_last_bytes": last[0],
            "publisher_first_bytes": first[1],
            "publisher_last_bytes": last[1],
        }

    def close(self) -> None:
        """End everything."""
        self._close_size()
        for process in (self.peer, *(self.nixl or ())):
            process.close()

    def _close_size(self) -> None:
        for reader in getattr(self, "readers", {}).values():
            reader.close()
        if self.raw is not None:
            self.raw.close()


def _start_nixl(python: str | None) -> tuple[Process, Process]:
    """Return initiator and target, connected.

    Raises:
        RuntimeError: No interpreter can import NIXL.
    """
    local = HERE.parents[1] / ".venvs" / "bench" / "bin" / "python"
    tried = [p for p in (python, sys.executable, str(local)) if p and Path(p).exists()]
    for candidate in tried:
        probe = subprocess.run(
            [candidate, "-c", "import nixl._api"], capture_output=True, check=False
        )
        if probe.returncode == 0:
            break
    else:
        raise RuntimeError(f"nixl cannot be imported by any of {', '.join(tried)}")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    script = str(HERE / "handoff_nixl.py")
    initiator = Process(candidate, script, "initiator", mark="\x1e")
    target = Process(candidate, script, "target", mark="\x1e")
    ours = initiator.ask("setup", payload_bytes=PAYLOAD_BYTES)
    theirs = target.ask("setup", payload_bytes=PAYLOAD_BYTES)
    initiator.ask("peer", **theirs)
    target.ask("peer", **ours)
    return initiator, target


def run(bench: Bench, sizes: list[int], repetitions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure; return block size -> contender -> medians."""
    order = random.Random(1)
    table: dict[str, dict[str, dict[str, float]]] = {}
    gigabytes = ROUNDS * PAYLOAD_BYTES / 1e9
    for block_bytes in sizes:
        bench.size(block_bytes)
        contenders = bench.contenders()
        for name, move in contenders.items():
            move()
            if name not in ("memcpy",) and not name.startswith("nixl"):
                bench.check()
        if bench.nixl is not None and not bench.nixl[0].ask("correct")["correct"]:
            raise RuntimeError("NIXL delivered damaged bytes")
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(repetitions):
            names = list(contenders)
            order.shuffle(names)
            for name in names:
                samples[name].append(bench.measure(name, contenders[name]))
        row = table[str(block_bytes)] = {}
        for name, pairs in samples.items():
            row[name] = {
                "gb_per_s": gigabytes / statistics.median(wall for wall, _ in pairs),
                "gb_per_cpu_s": gigabytes / statistics.median(cpu for _, cpu in pairs),
            }
            print(
                f"{block_bytes // KIB:>6} KiB  {name:<17} {row[name]['gb_per_s']:6.2f} GB/s "
                f"{row[name]['gb_per_cpu_s']:6.2f} GB/CPU-s",
                flush=True,
            )
    return table


def run_canonical(chosen: list[Case], repetitions: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measure unlike layouts; return case -> contender -> medians, and the ratios of the paths."""
    order = random.Random(1)
    table: dict[str, dict[str, dict[str, float]]] = {}
    peer = Process(sys.executable, str(HERE / "handoff_canonical.py"))
    bench = CanonicalBench(peer, warm_pages(PAYLOAD_BYTES, 255))
    try:
        for case in chosen:
            contenders = bench.start(case)
            for move in contenders.values():
                move()
                bench.target.check()
            samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
            for _ in range(repetitions):
                names = list(contenders)
                order.shuffle(names)
                for name in names:
                    cpu = cpu_s() + float(peer.ask("usage")["cpu_s"])
                    wall = time.perf_counter()
                    contenders[name]()
                    wall = time.perf_counter() - wall
                    cpu = cpu_s() + float(peer.ask("usage")["cpu_s"]) - cpu
                    samples[name].append((wall, cpu))
            table[str(case)] = _rates(samples)
            for name, rates in table[str(case)].items():
                ratio = f"  {rates['of_direct']:.2f} of direct" if "of_direct" in rates else ""
                print(
                    f"{case!s:<44} {name:<13} {rates['gb_per_s']:6.2f} GB/s "
                    f"{rates['gb_per_cpu_s']:6.2f} GB/CPU-s{ratio}",
                    flush=True,
                )
    finally:
        bench.close()
        peer.close()
    return table


def _rates(samples: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    rates = {}
    for name, pairs in samples.items():
        wall, cpu = (statistics.median(each) for each in zip(*pairs, strict=True))
        rates[name] = {
            "gb_per_s": PAYLOAD_BYTES / 1e9 / wall,
            "gb_per_cpu_s": PAYLOAD_BYTES / 1e9 / cpu,
        }
    for name, row in rates.items():
        direct = rates[name.replace("canonical", "direct")]
        if row is not direct:
            row["of_direct"] = row["gb_per_cpu_s"] / direct["gb_per_cpu_s"]
    return rates


def summary(
    table: dict[str, dict[str, dict[str, float]]], problem: str | None
) -> dict[str, object]:
    """Return the ratios by GB per CPU-second at 1 MiB."""
    row = table.get(str(MIB), {})

    def ratio(ours: str, theirs: list[str]) -> float | None:
        peers = [row[name]["gb_per_cpu_s"] for name in theirs if name in row]
        return round(row[ours]["gb_per_cpu_s"] / max(peers), 3) if peers else None

    found: dict[str, object] = {
        "shm_vs_memcpy": ratio("shm", ["memcpy"]),
        "shm_vs_nixl": ratio("shm", list(NIXL_PAUSES_S)),
        "tcp_vs_raw": ratio("tcp", ["raw"]),
    }
    if problem is not None:
        found["nixl_problem"] = problem
    return found


def main() -> None:
    """Run the benchmark; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--nixl-python", help="an interpreter that can import nixl")
    parser.add_argument("--handoffs", type=int, default=1000, help="for the memory check; 0: none")
    parser.add_argument(
        "--block-bytes", type=int, nargs="*", default=list(BLOCK_BYTES), help="no size: skip them"
    )
    parser.add_argument(
        "--cases", nargs="*", default=[""], help="parts of names of pairs of layouts; none: skip"
    )
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    if arguments.block_bytes or arguments.handoffs:
        bench = Bench(arguments.nixl_python)
        try:
            table = run(bench, arguments.block_bytes, arguments.repetitions)
            result = summary(table, bench.nixl_problem)
            if arguments.handoffs:
                result["memory"] = bench.flat_memory(arguments.handoffs)
            result["table"] = table
        finally:
            bench.close()
    chosen = [case for case in cases() if any(part in str(case) for part in arguments.cases)]
    if chosen:
        result["canonical"] = run_canonical(chosen, arguments.repetitions)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
