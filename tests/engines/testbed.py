"""Real engines' workers, a plain engine and the gateway on one machine: demo, tests, benchmarks.

Everything listens on loopback, is started under guards, and ends with the ``with`` statement. The
plain engine (the *monolith*) has no connector: it is what the split is compared with.

vLLM's servers run in the interpreter that runs this, SGLang's in that of ``make sglang``
(``DISAGG_SGLANG_PYTHON`` names another), all on CPUs.
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
from typing import Any, Literal, Self

import psutil
import yaml

from disagg_plugins.errors import DisaggError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.local import LocalFleet, RunningWorker, healthy, tail_of
from disagg_plugins.policy import Policy, WorkerPolicy, load_policy
from disagg_reference.launcher import ReferenceLauncher
from disagg_sglang.launcher import POLICY_ENV, WORKER_ENV, SglangLauncher, num_ranks
from disagg_vllm.launcher import VllmLauncher
from tests.engines.client import complete

MODEL_NAME = "demo"
GATEWAY_START_S = 60.0
ROOT = Path(__file__).resolve().parents[2]

Engine = Literal["vllm", "sglang", "reference", "trtllm"]
PLAIN = {"vllm": "vllm-plain", "sglang": "sglang-plain"}
"""What the testbed calls an engine without the connector."""

SGLANG_PYTHON_ENV = "DISAGG_SGLANG_PYTHON"
SGLANG_PYTHON = ROOT / ".venvs" / "sglang" / "bin" / "python"

SGLANG_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--grammar-backend", "none", "--disable-cuda-graph", "--disable-overlap-schedule"),
    # The fraction is of the memory that the whole machine has free; what is taken is bounded by
    # --max-total-tokens.
    *("--mem-fraction-static", "0.85", "--sleep-on-idle"),
)
"""What SGLang 0.5.23 needs to run on a CPU with PyTorch's kernels."""

SGLANG_DECODE_FLAGS = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
"""Without these a decode server registers host memory with CUDA."""

SGLANG_CPU_KERNELS = Path(__file__).resolve().parent / "sglang" / "cpu_kernels"
SGLANG_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    # Where NCCL is found, several ranks would give it a CPU as their device, and end.
    "SGLANG_NCCL_SO_PATH": "none",
}

SGLANG_START_S = 600.0
"""A server's three processes import SGLang for 50 CPU-seconds each; a fleet shares two cores."""


class TestbedError(DisaggError):
    """Something the testbed started does not run."""


@dataclass(frozen=True, slots=True)
class Server:
    """One engine server of the testbed.

    Attributes:
        name: Its name; also that of its log.
        role: ``prefill``, ``decode``, ``both``, or ``monolith`` (an engine without the connector).
        cpus: CPUs to pin it to; one compute thread for each.
        args: More flags.
        env: More environment.
        model: Another model folder than the testbed's.
        engine: ``vllm``, ``sglang``, ``reference``, or ``trtllm``: the TensorRT-LLM connector on
            the reference engine, which hosts it.
    """

    name: str
    role: str
    cpus: tuple[int, ...]
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None
    engine: Engine = "vllm"

    @property
    def answers_alone(self) -> bool:
        """Whether it completes a request that comes from no gateway; SGLang's halves refuse it."""
        return self.engine != "sglang" or self.role in ("both", "monolith")


class PlainVllmLauncher:
    """Starts vLLM as anyone would, without the connector."""

    engine = PLAIN["vllm"]

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the command of ``VllmLauncher`` without the connector's flag."""
        command = VllmLauncher().command(worker, policy, policy_path)
        argv = list(command.argv)
        at = argv.index("--kv-transfer-config")
        return LaunchCommand((*argv[:at], *argv[at + 2 :]), command.env)


class PlainSglangLauncher:
    """Starts SGLang as anyone would, without the transfer backend."""

    engine = PLAIN["sglang"]

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the command of ``SglangLauncher`` without what turns the plugin on."""
        command = SglangLauncher().command(worker, policy, policy_path)
        env = {k: v for k, v in command.env.items() if k not in (POLICY_ENV, WORKER_ENV)}
        return LaunchCommand(command.argv, env)


KV_CONNECTOR = {
    "kv_connector_config": {
        "connector_module": "disagg_trtllm.connector",
        "connector_scheduler_class": "DisaggKvConnectorScheduler",
        "connector_worker_class": "DisaggKvConnectorWorker",
    }
}
"""As ``trtllm-serve --extra_llm_api_options`` takes it."""


class HostedTrtllmLauncher:
    """Starts the reference engine as host of the TensorRT-LLM connector."""

    engine = "trtllm"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the command of ``ReferenceLauncher`` with the connector in place of its own."""
        command = ReferenceLauncher().command(worker, policy, policy_path)
        argv = list(command.argv)
        for flag in ("--policy", "--worker"):
            at = argv.index(flag)
            del argv[at : at + 2]
        config = policy_path.with_name("kv_connector.yaml")
        config.write_text(yaml.safe_dump(KV_CONNECTOR))
        env = {"DISAGG_POLICY": str(policy_path), "DISAGG_WORKER": worker.name}
        argv += ["--kv-connector-config", str(config)]
        return LaunchCommand(tuple(argv), {**command.env, **env})


LAUNCHERS = (
    VllmLauncher(),
    SglangLauncher(),
    ReferenceLauncher(),
    HostedTrtllmLauncher(),
    PlainVllmLauncher(),
    PlainSglangLauncher(),
)


def sglang_python() -> Path:
    """Return the interpreter that has SGLang; it may not be there."""
    return Path(os.environ.get(SGLANG_PYTHON_ENV) or SGLANG_PYTHON)


def sglang_env(server: Server, args: Sequence[str]) -> dict[str, str]:
    """Return the environment of an SGLang server: on a CPU, with the stand-in for its kernels."""
    path = [str(SGLANG_CPU_KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**SGLANG_ENV, "PYTHONPATH": os.pathsep.join(path)}
    if server.cpus:
        # SGLang gives each rank its threads by a kernel that the stand-in does not have.
        env["OMP_NUM_THREADS"] = str(max(1, len(server.cpus) // num_ranks(args)))
    return env


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
        flags: Flags of every vLLM server.
        sglang_flags: Flags of every SGLang server, beside those that a CPU needs.
        policy: Sections of the policy to add or change (``handoff``, ``scheduler``, ...).
        kv_gib: KV cache of each vLLM server, in GiB.
        kv_tokens: KV cache of each SGLang server, in tokens.
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
        sglang_flags: Sequence[str] = (),
        policy: Mapping[str, Any] | None = None,
        kv_gib: int = 1,
        kv_tokens: int = 8192,
        gateway: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder.resolve()
        self.model = model.resolve()
        self.servers = tuple(servers)
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
        self.serve_path = self.policy_path  # what the gateway is started on
        self._start_path = self.folder / "start.yaml"
        sglang_flags = ("--max-total-tokens", str(kv_tokens), *sglang_flags)
        launches = {
            s.name: self._vllm_launch(s, flags, kv_gib)
            if s.engine == "vllm"
            else self._reference_launch(s)
            if s.engine in ("reference", "trtllm")
            else self._sglang_launch(s, sglang_flags)
            for s in servers
        }
        workers = [self._worker(s, launches[s.name]) for s in servers]
        text: dict[str, Any] = {
            "model": MODEL_NAME,
            "fleet": {"workers": [w for w in workers if w["engine"] not in PLAIN.values()]},
            "telemetry": {"records": "records.jsonl"},
            **(policy or {}),
        }
        text["gateway"] = {"port": gateway_port, **text.get("gateway", {})}
        everything = {**text, "fleet": {"workers": workers}}
        self._start_path.write_text(yaml.safe_dump(everything))
        if text["fleet"]["workers"]:
            self.policy_path.write_text(yaml.safe_dump(text))
        self._fleet: LocalFleet | None = None

    def _worker(self, server: Server, launch: dict[str, Any]) -> dict[str, Any]:
        monolith = server.role == "monolith"
        return {
            "name": server.name,
            "url": self.urls[server.name],
            "engine": PLAIN[server.engine] if monolith else server.engine,
            "role": "both" if monolith else server.role,
            "launch": {
                "model": str(server.model or self.model),
                "cpus": list(server.cpus),
                **launch,
            },
        }

    def _vllm_launch(self, server: Server, flags: Sequence[str], kv_gib: int) -> dict[str, Any]:
        return {
            "python": sys.executable,
            "args": [*flags, *server.args],
            "env": {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), **server.env},
        }

    def _sglang_launch(self, server: Server, flags: Sequence[str]) -> dict[str, Any]:
        role_flags = SGLANG_DECODE_FLAGS if server.role == "decode" else ()
        args = [*SGLANG_FLAGS, *role_flags, *flags, *server.args]
        return {
            "python": str(sglang_python()),
            "args": args,
            "env": {**sglang_env(server, args), **server.env},
            "start_s": SGLANG_START_S,
        }

    def _reference_launch(self, server: Server) -> dict[str, Any]:
        return {"python": sys.executable, "args": list(server.args), "env": dict(server.env)}

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
            {launcher.engine: launcher for launcher in LAUNCHERS},
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
        """Send every server a first request: vLLM's CPU build compiles for seconds then.

        SGLang has warmed itself up before it calls itself healthy.
        """
        self.say("warming up")
        urls = [self.urls[s.name] for s in self.servers if s.answers_alone]
        if not urls:
            return
        with ThreadPoolExecutor(len(urls)) as pool:
            answers = [
                pool.submit(complete, url, "Hello", max_tokens=2, model=MODEL_NAME) for url in urls
            ]
            for answer in answers:
                answer.result()

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        log_path = self.folder / "logs" / "gateway.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "disagg_plugins.cli.main", "serve", str(self.serve_path)]
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

    def restart(self, name: str) -> None:
        """Start a server again that ended or was killed, and wait until it is healthy.

        Raises:
            DisaggError: It did not start; the text holds the end of its log.
        """
        old = self.running(name)
        if old.guard.stdin is not None:
            old.guard.stdin.close()
        old.guard.wait(GATEWAY_START_S)
        policy = load_policy(self._start_path)
        only = policy.fleet.model_copy(update={"workers": [old.policy]})
        one = LocalFleet(
            policy.model_copy(update={"fleet": only}),
            self.policy_path,
            {launcher.engine: launcher for launcher in LAUNCHERS},
            run_dir=self.folder / "logs",
            say=self.say,
        )
        try:
            one.start()
        except BaseException:
            one.stop()
            raise
        if self._fleet is None:
            one.stop()
            raise TestbedError(f"the fleet of {name!r} was stopped meanwhile")
        self._fleet.workers[self._fleet.workers.index(old)] = one.workers[0]

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
