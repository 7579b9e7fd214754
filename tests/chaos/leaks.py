"""What is left when nobody asks anything any more."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.fleet import Fleet, Program, fetched

QUIET_S = 15.0
"""How long things may take to go away: the workers' leases take 1 s, all else less."""

SHARED = ("/memfd:", "/dev/shm/")
"""Where shared memory shows among a process's descriptors."""


def segments(program: Program) -> int:
    """Return how many segments of shared memory a process has open."""
    folder = Path(f"/proc/{program.look().pid}/fd")
    count = 0
    for link in folder.iterdir():
        with suppress(OSError):  # closed meanwhile
            count += os.readlink(link).startswith(SHARED)
    return count


@dataclass(frozen=True, slots=True)
class Baseline:
    """A gateway at rest: descriptors beside its connections, its tasks, its memory."""

    fds: int
    tasks: int
    rss_mib: float


def _connections(status: dict[str, object]) -> int:
    workers = status["workers"]
    pools = [w["connections"] for w in workers] if isinstance(workers, list) else []
    clients = status["client_connections"]
    return sum(sum(p.values()) for p in pools) + (clients if isinstance(clients, int) else 0)


async def rest(gateway: Program) -> Baseline | None:
    """Look at a gateway; None when it does not answer."""
    status = await fetched(f"{gateway.url}/internal/status")
    if status is None:
        return None
    process = gateway.look()
    # the connection of this question is closed by now, or counted in both
    fds = process.num_fds() - _connections(status)
    return Baseline(fds, int(status["tasks"]), round(process.memory_info().rss / (1 << 20), 1))


async def gateway_leaks(gateway: Program, before: Baseline | None) -> list[str]:
    """Return what a gateway still has."""
    status = await fetched(f"{gateway.url}/internal/status")
    now = await rest(gateway)
    if status is None or now is None:
        return [f"{gateway.name} does not answer"]
    found = []
    for key, most in (("in_flight", 0), ("handoffs_open", 0), ("client_connections", 1)):
        if status[key] > most:
            found.append(f"{gateway.name} {key}: {status[key]}")
    for worker in status["workers"]:
        counts = worker["connections"]
        held = {k: worker[k] for k in ("requests", "prompt_tokens")}
        held |= {k: counts[k] for k in ("busy", "connecting")}
        found += [f"{gateway.name} {worker['name']} {k}: {v}" for k, v in held.items() if v]
    if before is not None and now.tasks > before.tasks:
        found.append(f"{gateway.name} tasks: {now.tasks}, at rest {before.tasks}")
    if before is not None and now.fds > before.fds + 1:
        found.append(f"{gateway.name} descriptors: {now.fds}, at rest {before.fds}")
    return found


async def worker_leaks(worker: Program, idle: int) -> list[str]:
    """Return what a worker still has; ``idle``: connections that gateways keep to it."""
    seen = await fetched(f"{worker.url}/seen")
    if seen is None:
        return [f"{worker.name} does not answer"]
    found = [f"{worker.name} {k}: {seen[k]}" for k in ("leases", "answering", "jobs") if seen[k]]
    if seen["connections"] > idle + 1:
        found.append(f"{worker.name} connections: {seen['connections']}, gateways keep {idle}")
    return found


async def leaks(fleet: Fleet, before: dict[str, Baseline | None]) -> list[str]:
    """Return what does not go away within ``QUIET_S``, one line each."""
    end_s = time.monotonic() + QUIET_S
    while True:
        held = {p.name: segments(p) for p in fleet.programs()}
        found = [f"{name} shared memory: {count}" for name, count in held.items() if count]
        idle = dict.fromkeys(fleet.workers, 0)
        for name, gateway in fleet.gateways.items():
            found += await gateway_leaks(gateway, before.get(name))
            status = await fetched(f"{gateway.url}/internal/status")
            for worker in (status or {}).get("workers", ()):
                idle[worker["name"]] += worker["connections"]["idle"] + 1  # one may be probing
        for name, worker in fleet.workers.items():
            found += await worker_leaks(worker, idle[name])
        if not found or time.monotonic() > end_s:
            return found
        await asyncio.sleep(0.2)
