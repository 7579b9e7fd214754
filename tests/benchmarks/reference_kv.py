"""Gather and scatter of whole KV blocks against a plain copy on the same device.

``python tests/benchmarks/reference_kv.py [--device cuda]``. Runs on a CPU as well. Nothing of it
was run on CUDA yet; the goal there is 0.8 of the bandwidth of a copy for blocks of 64 KiB and more.

For each size of block, blocks in random order are gathered into a contiguous tensor and scattered
back (``disagg_reference.pool``), and the same bytes are copied from one contiguous tensor to
another. Bandwidth counts each byte once, as it was moved. The three take turns, so that what slows
the machine slows all; the median of the rounds is told. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "adapters"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disagg_reference.pool import DTYPES, gather_blocks, scatter_blocks

KIB, GIB = 1 << 10, 1 << 30
BLOCK_KIB = (4, 16, 64, 256, 1024, 4096)
NUM_LAYERS = 16
GOAL, GOAL_FROM_KIB = 0.8, 64
WARM_UP = 3


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long the device takes for ``work``."""
    if device.type != "cuda":
        begun_s = time.perf_counter()
        work()
        return time.perf_counter() - begun_s
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(
    block_kib: int, *, pool_bytes: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, float]:
    """Return GiB/s of copy, gather and scatter for one size of block, and their ratios.

    Raises:
        ValueError: A block of that size has no whole number of elements, or does not fit.
    """
    row, rest = divmod(block_kib * KIB, NUM_LAYERS * 2 * dtype.itemsize)
    num_blocks = pool_bytes // (block_kib * KIB)
    if rest or num_blocks < 2:
        raise ValueError(f"blocks of {block_kib} KiB do not fit a pool of {pool_bytes} bytes")
    shape = (num_blocks, NUM_LAYERS, 2, row)
    pool = torch.arange(num_blocks, device=device).view(-1, 1, 1, 1) % 251
    pool = pool.to(dtype).expand(shape).contiguous()
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randperm(num_blocks, generator=draw)[: num_blocks // 2].to(device)
    held = torch.empty((len(blocks), *shape[1:]), dtype=dtype, device=device)
    source = torch.ones_like(held)
    before = pool.clone()
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: held.copy_(source),
        "gather": lambda: gather_blocks(pool, blocks, held),
        "scatter": lambda: scatter_blocks(pool, blocks, held),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(WARM_UP + rounds):
        for name, work in works.items():  # scatter last: it puts back what gather took
            took_s = seconds(work, device)
            if number >= WARM_UP:
                taken[name].append(took_s)
    if not torch.equal(pool, before):
        raise SystemExit(f"reference_kv.py: blocks of {block_kib} KiB did not come back")
    moved_gib = held.numel() * dtype.itemsize / GIB
    speed = {name: moved_gib / statistics.median(each) for name, each in taken.items()}
    return {
        **{f"{name}_gib_per_s": round(value, 2) for name, value in speed.items()},
        "gather_of_copy": round(speed["gather"] / speed["copy"], 3),
        "scatter_of_copy": round(speed["scatter"] / speed["copy"], 3),
    }


def main() -> int:
    """Measure every size and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--pool-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device(args.device)
    found = {}
    for block_kib in BLOCK_KIB:
        found[block_kib] = one = measure(
            block_kib,
            pool_bytes=args.pool_mib << 20,
            dtype=DTYPES[args.dtype],
            device=device,
            rounds=args.rounds,
        )
        print(f"{block_kib:5} KiB: {one}", file=sys.stderr, flush=True)
    large = [one for block_kib, one in found.items() if block_kib >= GOAL_FROM_KIB]
    least = min(min(one["gather_of_copy"], one["scatter_of_copy"]) for one in large)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    met = least >= GOAL if device.type == "cuda" else None  # the goal is one for GPUs
    summary = {"device": name, "least_of_copy": least, "goal_on_cuda": GOAL, "met": met}
    print(json.dumps({**summary, "blocks_kib": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
