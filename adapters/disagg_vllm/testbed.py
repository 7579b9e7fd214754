"""Real vLLM workers, a plain vLLM and the gateway on one machine: for demo, tests, benchmarks.

Everything listens on loopback, is started under guards, and ends with the ``with`` statement. The
plain vLLM (the *monolith*) has no connector: it is what the split is compared with.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from disagg_plugins.errors import DisaggError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.local import LocalFleet, RunningWorker, healthy, tail_of
from disagg_plugins.policy import Policy, WorkerPolicy, load_policy
from disagg_vllm.client import complete
from disagg_vllm.launcher import VllmLauncher

MODEL_NAME = "demo"
GATEWAY_START_S = 60.0
PLAIN = "vllm-plain"


class TestbedError(DisaggError):
    """Something the testbed started does not run."""


@dataclass(frozen=True, slots=True)
class Server:
    """One vLLM server of the testbed.

    Attributes:
        name: Its name; also that of its log.
        role: ``prefill``, ``decode``, ``both``, or ``monolith`` (a vLLM without the connector).
        cpus: CPUs to pin it to; one compute thread for each.
        args: More flags.
        env: More environment.
        model: Another model folder than the testbed's.
    """

    name: str
    role: str
    cpus: tuple[int, ...]
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None


class PlainLauncher:
    """Starts vLLM as anyone would, without the connector."""

    engine = PLAIN

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the command of ``VllmLauncher`` without the connector's flag."""
        command = VllmLauncher().command(worker, policy, policy_path)
        argv = list(command.argv)
        at = argv.index("--kv-transfer-config")
        return LaunchCommand((*argv[:at], *argv[at + 2 :]), command.env)


PORTS = range(10_000, 30_000)
"""Below the kernel's usual range of outgoing ports, so that no connection takes one meanwhile."""


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of the loopback interface that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


class Testbed:
    """Starts servers and the gateway before them; use it in a ``with`` statement.

    Args:
        folder: Where policy, records and logs go.
        model: The model's folder.
        servers: What to start.
        flags: vLLM flags of every server.
        policy: Sections of the policy to add or change (``handoff``, ``scheduler``, ...).
        kv_gib: KV cache of each server, in GiB.
        gateway: Whether to start the gateway.
        say: Takes one line of progress.
    """

    __test__ = False

    def __init__(
        self,
        folder: Path,
        model: Path,
        servers: Sequence[Server],
        *,
        flags: Sequence[str] = (),
        policy: Mapping[str, Any] | None = None,
        kv_gib: int = 1,
        gateway: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder.resolve()
        self.model = model.resolve()
        self.say = say
        self._with_gateway = gateway
        self._gateway: subprocess.Popen[bytes] | None = None
        self._env = {**os.environ}
        self._env.setdefault("DISAGG_SECRET", secrets.token_hex(16))
        gateway_port, *ports = free_ports(1 + len(servers))
        self.gateway_url = f"http://127.0.0.1:{gateway_port}"
        self.urls = {s.name: f"http://127.0.0.1:{p}" for s, p in zip(servers, ports, strict=True)}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.policy_path = self.folder / "disagg.yaml"
        self._start_path = self.folder / "start.yaml"
        workers = [self._worker(s, flags, kv_gib) for s in servers]
        text: dict[str, Any] = {
            "model": MODEL_NAME,
            "fleet": {"workers": [w for w in workers if w["engine"] == "vllm"]},
            "telemetry": {"records": "records.jsonl"},
            **(policy or {}),
        }
        text["gateway"] = {"port": gateway_port, **text.get("gateway", {})}
        everything = {**text, "fleet": {"workers": workers}}
        self._start_path.write_text(yaml.safe_dump(everything))
        if text["fleet"]["workers"]:
            self.policy_path.write_text(yaml.safe_dump(text))
        self._fleet: LocalFleet | None = None

    def _worker(self, server: Server, flags: Sequence[str], kv_gib: int) -> dict[str, Any]:
        monolith = server.role == "monolith"
        return {
            "name": server.name,
            "url": self.urls[server.name],
            "engine": PLAIN if monolith else "vllm",
            "role": "both" if monolith else server.role,
            "launch": {
                "model": str(server.model or self.model),
                "python": sys.executable,
                "cpus": list(server.cpus),
                "args": [*flags, *server.args],
                "env": {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), **server.env},
            },
        }

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until it is healthy.

        Raises:
            DisaggError: Something did not start; the text holds the end of its log.
        """
        # The workers inherit this process's environment, and with it the secret.
        os.environ.setdefault("DISAGG_SECRET", self._env["DISAGG_SECRET"])
        self._fleet = LocalFleet(
            load_policy(self._start_path),
            self.policy_path,
            {"vllm": VllmLauncher(), PLAIN: PlainLauncher()},
            run_dir=self.folder / "logs",
            say=self.say,
        )
        if self._with_gateway:
            self.start_gateway()
        self._fleet.start()
        self._warm_up()
        if self._with_gateway:
            self.wait_ready()

    def _warm_up(self) -> None:
        """Send every server a first request: vLLM's CPU build compiles for seconds then."""
        self.say("warming up")
        with ThreadPoolExecutor(len(self.urls)) as pool:
            answers = [
                pool.submit(complete, url, "Hello", max_tokens=2, model=MODEL_NAME)
                for url in self.urls.values()
            ]
            for answer in answers:
                answer.result()

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        log_path = self.folder / "logs" / "gateway.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "disagg_plugins.cli.main", "serve", str(self.policy_path)]
        with log_path.open("ab") as log:
            self._gateway = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._env
            )
        self._wait(lambda: healthy(self.gateway_url), "the gateway to answer")

    def wait_ready(self) -> None:
        """Wait until the gateway has found every worker healthy."""
        self._wait(self._ready, "the gateway to find its workers healthy")

    def stop_gateway(self) -> int | None:
        """End the gateway and return its exit code."""
        if self._gateway is None:
            return None
        self._gateway.terminate()
        try:
            code = self._gateway.wait(GATEWAY_START_S)
        except subprocess.TimeoutExpired:
            self._gateway.kill()
            code = self._gateway.wait()
        self._gateway = None
        return code

    def stop(self) -> None:
        """End everything; idempotent."""
        self.stop_gateway()
        if self._fleet is not None:
            self._fleet.stop()
            self._fleet = None

    def _ready(self) -> bool:
        from urllib.error import URLError
        from urllib.request import urlopen

        try:
            with urlopen(f"{self.gateway_url}/internal/status", timeout=5) as answer:
                return all(worker["healthy"] for worker in json.load(answer)["workers"])
        except (URLError, OSError):
            return False

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + GATEWAY_START_S
        while not condition():
            log = self.folder / "logs" / "gateway.log"
            if self._gateway is not None and (code := self._gateway.poll()) is not None:
                lines = "\n  | ".join(tail_of(log))
                raise TestbedError(f"the gateway ended with code {code}:\n  | {lines}")
            if time.monotonic() > deadline_s:
                lines = "\n  | ".join(tail_of(log))
                raise TestbedError(f"waited {GATEWAY_START_S:g} s for {what}:\n  | {lines}")
            time.sleep(0.1)

    def running(self, name: str) -> RunningWorker:
        """Return a started server."""
        if self._fleet is not None:
            for worker in self._fleet.workers:
                if worker.policy.name == name:
                    return worker
        raise TestbedError(f"no server {name!r} is running")

    def processes(self, name: str) -> list[psutil.Process]:
        """Return every process of a server, the one that computes included."""
        return psutil.Process(self.running(name).guard.pid).children(recursive=True)

    def gateway_process(self) -> psutil.Process:
        """Return the gateway's process."""
        if self._gateway is None:
            raise TestbedError("the gateway is not running")
        return psutil.Process(self._gateway.pid)

    def records(self) -> list[dict[str, Any]]:
        """Return the per-request records that the gateway has written so far."""
        path = self.folder / "records.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def log(self, name: str) -> str:
        """Return a server's output so far."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")
