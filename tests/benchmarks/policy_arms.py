"""The arms of the policy benchmark: a proxy with a rule before a fleet of pretend workers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import psutil
import yaml

from disagg_plugins.builtins import BUILTINS
from disagg_plugins.policy import SchedulerPolicy
from disagg_plugins.testing.pace import read_profile

if TYPE_CHECKING:
    from contextlib import ExitStack

    from tests.benchmarks.workloads import Slo

ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0
SECRET = "0123456789abcdef0123456789abcdef"
NEVER_TOKENS = 1_000_000_000
LEASE_S = 30.0

RULES = {
    "never": ("whole", "never"),
    "always": ("halves", "always"),
    "threshold": ("halves", "threshold"),
    "load": ("halves", "load"),
    "slo": ("halves", "slo"),
    "slo-both": ("whole", "slo"),
}
"""Arms with our gateway: the fleet, and the policy's ``scheduler.split.rule``."""

ROUTERS = ("vllm-router", "vllm-router-whole")
ALONE = frozenset({"never", "vllm-router-whole"})
"""Arms that never split."""

OLD_RULES = ("never", "always", "threshold")
"""What a release without these rules can say by its threshold."""

WORKERS = 4
WHOLE = ("both",) * WORKERS


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy and its fleet.

    Attributes:
        name: As it is printed.
        roles: Of its workers, the same number for every arm.
        rule: Of our gateway; None: the arm is vllm-router.
    """

    name: str
    roles: tuple[str, ...]
    rule: str | None


def arms(names: Sequence[str], prefills: int) -> list[Arm]:
    """Return the arms of these names, as far as this checkout and environment have them.

    Args:
        names: Of ``RULES`` and ``ROUTERS``.
        prefills: Workers that a split fleet gives to prefill.
    """
    halves = ("prefill",) * prefills + ("decode",) * (WORKERS - prefills)
    found = []
    for name in names:
        if name in ROUTERS:
            if router_binary() is not None:
                found.append(Arm(name, WHOLE if name in ALONE else halves, None))
            continue
        fleet, rule = RULES[name]
        if rule in OLD_RULES or rule in BUILTINS:
            found.append(Arm(name, WHOLE if fleet == "whole" else halves, rule))
    return found


def router_binary() -> Path | None:
    """Return vllm-router of the benchmark's environment, if it is there."""
    path = ROOT / ".venvs" / "bench" / "bin" / "vllm-router"
    return path if path.exists() else None


def scheduler_section(rule: str, slo: Slo) -> dict[str, Any]:
    """Return the policy's ``scheduler`` for a rule, with the workload's bounds as its SLO class."""
    section: dict[str, Any] = {"split": {"rule": rule}}
    if rule not in BUILTINS:
        least = {"never": NEVER_TOKENS, "always": 0}[rule]
        section["split"] = {"min_prompt_tokens": least}
    if "slo_classes" in SchedulerPolicy.model_fields:
        bounds = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        section |= {"slo_classes": {"bench": bounds}, "default_slo_class": "bench"}
    return section


class Running:
    """A started arm.

    Attributes:
        arm: Which.
        port: Of its proxy.
        urls: Of its workers.
    """

    def __init__(
        self, arm: Arm, port: int, urls: list[str], process: psutil.Process, path: str
    ) -> None:
        self.arm = arm
        self.port = port
        self.urls = urls
        self.process = process
        self._path = path

    def wait(self) -> None:
        """Wait until it serves."""
        wait_for(f"http://127.0.0.1:{self.port}{self._path}", self.arm.name)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def port_range(count: int) -> int:
    """Return the first of ``count`` free ports in a row, below those of outgoing connections."""
    while True:
        base = random.SystemRandom().randrange(12_000, 31_000)
        if all(_free(base + i) for i in range(count)):
            return base


def _free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _env() -> dict[str, str]:
    path = f"{ROOT}:{ROOT}/adapters:{ROOT}/connectors"
    return {**os.environ, "PYTHONPATH": path, "DISAGG_SECRET": SECRET}


def _start(stack: ExitStack, argv: list[str], log: Path) -> psutil.Process:
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=_env(), stdout=out, stderr=out, cwd=ROOT)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)
    return psutil.Process(process.pid)


def wait_for(url: str, what: str) -> None:
    """Wait until a page answers."""
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        try:
            with urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"{what} was not ready within {START_S:g} s")


def start_workers(
    stack: ExitStack, folder: Path, count: int, profile: str, speed: float, interval: int
) -> tuple[int, psutil.Process]:
    """Start pretend workers in one process; return the first port."""
    base = port_range(count)
    argv = [sys.executable, "-m", "disagg_plugins.testing.fake_engine"]
    argv += ["--workers", str(count), "--port-base", str(base), "--profile", profile]
    argv += ["--speed", str(speed), "--stream-interval", str(interval), "--lease-s", str(LEASE_S)]
    process = _start(stack, argv, folder / "workers.log")
    wait_for(f"http://127.0.0.1:{base + count - 1}/health", "the pretend workers")
    return base, process


def start_arm(
    stack: ExitStack, folder: Path, arm: Arm, first_port: int, slo: Slo, profile: str
) -> Running:
    """Start the proxy of an arm before workers that run already; ``wait`` until it serves."""
    urls = [f"http://127.0.0.1:{first_port + i}" for i in range(len(arm.roles))]
    port = port_range(2)
    if arm.rule is None:
        argv, path = _router(arm, port, urls), "/health"
    else:
        policy = folder / f"{arm.name}.yaml"
        policy.write_text(yaml.safe_dump(_policy(arm, arm.rule, port, urls, slo, profile)))
        argv = [sys.executable, "-m", "disagg_plugins.cli.main", "serve", str(policy)]
        path = "/ready"
    process = _start(stack, argv, folder / f"{arm.name}.log")
    return Running(arm, port, urls, process, path)


def _policy(
    arm: Arm, rule: str, port: int, urls: list[str], slo: Slo, profile: str
) -> dict[str, Any]:
    # a real worker says in its hello what its cache holds
    timing = read_profile(profile)
    room = timing.cached_blocks * timing.block_tokens
    return {
        "model": "fake-model",
        "fleet": {
            "workers": [
                {"name": f"w{i}", "url": url, "role": role, "capacity": 4096, "kv_tokens": room}
                for i, (url, role) in enumerate(zip(urls, arm.roles, strict=True))
            ]
        },
        "scheduler": scheduler_section(rule, slo),
        "gateway": {"port": port},
    }


def _router(arm: Arm, port: int, urls: list[str]) -> list[str]:
    argv = [str(router_binary()), "--host", "127.0.0.1", "--port", str(port)]
    if arm.roles == WHOLE:
        argv += ["--worker-urls", *urls]
    else:
        argv.append("--vllm-pd-disaggregation")
        for url, role in zip(urls, arm.roles, strict=True):
            argv += [f"--{role}", url]
    return [
        *argv,
        # its own default, cache_aware, which knows the prompts' beginnings
        *("--prometheus-port", str(port + 1), "--worker-startup-check-interval", "1"),
        *("--log-level", "error", "--max-concurrent-requests", "4096"),
    ]
