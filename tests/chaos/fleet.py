"""Pretend workers and gateways as processes that can be killed, stopped and started again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import yaml

from tests.chaos.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef0123456789abcdef"
START_S = 20.0
LEASE_S = 1.0
SPEED = 5.0
"""Of the workers: a token takes 4 ms, so that faults hit answers in the midst."""

TIMES = {
    "connect_s": 0.5,
    "prefill_s": 1.5,
    "first_byte_s": 2.0,
    "idle_s": 1.5,
    "probe_s": 0.2,
    "unhealthy_after": 2,
    "drain_s": 2.0,
}
BOUND_S = 20.0
"""No answer may take longer. A split request that fails at every step: 1.5 s prefill, twice 2 s for
the first byte, then an answer of at most 90 tokens with gaps below 1.5 s; a worker that alone
carries the whole load writes those in a few seconds."""


def free_ports(count: int) -> list[int]:
    """Return ports nobody listens on, below the kernel's range of outgoing ones."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def fetch(url: str, body: object | None = None, timeout_s: float = 5.0) -> Any:
    """Return the JSON of a page; with a body, post it."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data), timeout=timeout_s) as answer:
        return json.load(answer)


async def fetched(url: str, body: object | None = None) -> Any:
    """Do ``fetch`` beside the loop; None when there is no answer."""
    try:
        return await asyncio.to_thread(fetch, url, body, 2.0)
    except (OSError, ValueError):
        return None


class Program:
    """One process that can be ended and started again."""

    def __init__(self, name: str, port: int, argv: list[str], log: Path) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._argv = argv
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        env = {**os.environ, "DISAGG_SECRET": SECRET}
        env["PYTHONPATH"] = f"{ROOT}:{ROOT}/adapters:{ROOT}/connectors"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    async def ended(self, within_s: float) -> None:
        """Wait for its end; then kill it."""
        if self._process is None:
            return
        try:
            await asyncio.to_thread(self._process.wait, within_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait, within_s)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(START_S)

    def look(self) -> psutil.Process:
        """Return the process."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return psutil.Process(self._process.pid)

    def wait_healthy(self, path: str = "/health") -> None:
        """Wait until it answers."""
        end_s = time.monotonic() + START_S
        while True:
            with suppress(OSError, ValueError):
                fetch(f"{self.url}{path}", timeout_s=1.0)
                return
            if time.monotonic() > end_s:
                said = self._log.read_text()[-2000:]
                raise RuntimeError(f"{self.name} did not answer within {START_S:g} s: {said}")
            time.sleep(0.05)


class Fleet:
    """Workers, proxies before some of them, and gateways before all.

    Args:
        folder: For policies, records and logs.
        prefills: How many prefill workers.
        decodes: How many decode workers.
        gateways: How many gateways.
    """

    def __init__(self, folder: Path, prefills: int, decodes: int, gateways: int) -> None:
        names = [f"p{i}" for i in range(prefills)] + [f"d{i}" for i in range(decodes)]
        self.proxied = tuple(n for n in names if n[1:] == "0")
        ports = iter(free_ports(2 * len(names) + gateways + 1))
        engine = [sys.executable, "-m", "disagg_plugins.testing.fake_engine"]
        engine += ["--profile", "opt-13b-a100", "--speed", str(SPEED), "--lease-s", str(LEASE_S)]
        self.workers = {}
        for name in [*names, "reference"]:
            port = next(ports)
            argv = [*engine, "--port", str(port)]
            if name == "reference":
                argv[argv.index("--speed") + 1] = "1000"
            self.workers[name] = Program(name, port, argv, folder / f"{name}.log")
        self.reference = self.workers.pop("reference")
        self.proxy_ports = {name: next(ports) for name in self.proxied}
        self.proxies: dict[str, Proxy] = {}
        self.gateways = {}
        for number in range(gateways):
            name, port = f"g{number}", next(ports)
            policy = folder / f"{name}.yaml"
            policy.write_text(yaml.safe_dump(self._policy(port, folder / f"{name}.jsonl")))
            argv = [sys.executable, "-m", "disagg_plugins.cli.main", "serve", str(policy)]
            self.gateways[name] = Program(name, port, argv, folder / f"{name}.log")
        self.records = [folder / f"{name}.jsonl" for name in self.gateways]
        for path in self.records:
            path.unlink(missing_ok=True)  # of an earlier run in the same folder

    def _policy(self, port: int, records: Path) -> dict[str, Any]:
        workers = [
            {
                "name": name,
                "url": f"http://127.0.0.1:{self.proxy_ports.get(name, worker.port)}",
                "role": "prefill" if name.startswith("p") else "decode",
                "capacity": 64,
            }
            for name, worker in self.workers.items()
        ]
        return {
            "model": "fake-model",
            "fleet": {"workers": workers},
            "gateway": {"port": port, **TIMES},
            "telemetry": {"records": str(records), "report_wait_s": 0.2},
        }

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start everything and wait until the gateways have found every worker."""
        for program in self.programs():
            program.start()
        for name, port in self.proxy_ports.items():
            proxy = self.proxies[name] = Proxy(port, self.workers[name].port, tasks)
            await proxy.start()
        for program in self.programs():
            await asyncio.to_thread(program.wait_healthy)
        await self.all_healthy()

    async def all_healthy(self) -> None:
        """Wait until every gateway has found every worker."""
        end_s = time.monotonic() + START_S
        for gateway in self.gateways.values():
            while True:
                status = await fetched(f"{gateway.url}/internal/status")
                if status is not None and all(w["healthy"] for w in status["workers"]):
                    break
                if time.monotonic() > end_s:
                    raise RuntimeError(f"{gateway.name} does not find its workers: {status}")
                await asyncio.sleep(0.05)

    def programs(self) -> list[Program]:
        """Return every process."""
        return [self.reference, *self.workers.values(), *self.gateways.values()]

    def stop(self) -> None:
        """End everything."""
        for proxy in self.proxies.values():
            proxy.stop()
        for program in self.programs():
            program.stop()
