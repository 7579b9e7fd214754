"""What a canary costs the gateway: CPU time a request with it on against off.

Three gateways stand before the same kind of fast fake workers: one without a canary, one with a
canary at half of the traffic, one that copies a twentieth of the requests besides. Rounds alternate
between them; only the gateway's own CPU time (user and system) counts; medians are told. Requests
are split and streamed, of 64 tokens; ``short`` are those of two tokens, where what a request costs
weighs most. The last line is one JSON object. Takes about three minutes.

    .venvs/dev/bin/python tests/benchmarks/canary.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import uvloop
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gateway import Proxy, free_port, load, payload, say, start, wait_ready

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef0123456789abcdef"
SHAPES = {"request": (64, 2_000), "short": (2, 4_000)}
"""Tokens of an answer, and requests a round: CPU time is told in steps of 10 ms."""

SHADOW = {"share": 0.05, "control": 0.5, "max_per_s": 1_000.0, "max_in_flight": 100}


def policy(ports: tuple[int, int], arm: str, gateway: int) -> dict[str, object]:
    return {
        "fleet": {
            "workers": [
                {
                    "name": f"{arm}-{role}",
                    "url": f"http://127.0.0.1:{port}",
                    "role": role,
                    "capacity": 4096,
                }
                for role, port in zip(("prefill", "decode"), ports, strict=True)
            ]
        },
        "scheduler": {"split": {"rule": "always"}},
        "gateway": {"port": gateway, "probe_generate_s": None},
        "telemetry": {"report_wait_s": 0.5},
    }


def canary(shadow: bool) -> dict[str, object]:
    return {
        "candidate": "candidate.yaml",
        "steps": [50, 100],
        "bake_s": 3_600,
        "store": {"path": f"rollout-{shadow}.sqlite"},
        **({"shadow": SHADOW} if shadow else {}),
    }


def start_all(stack: ExitStack) -> list[Proxy]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = f"{ROOT}:{ROOT}/adapters:{ROOT}/connectors"
    env = {**os.environ, "PYTHONPATH": path, "DISAGG_SECRET": SECRET}
    fake = [sys.executable, "-m", "disagg_plugins.testing.fake_engine"]
    ports = [free_port() for _ in range(4)]
    for port in ports:
        start(stack, [*fake, "--port", str(port)], env, folder / f"{port}.log")
        wait_ready(port, "/health", "a worker")
    disagg = [sys.executable, "-m", "disagg_plugins.cli.main"]
    proxies = []
    for name in ("off", "on", "shadow"):
        port = free_port()
        baseline = policy((ports[0], ports[1]), "baseline", port)
        if name != "off":
            baseline["canary"] = canary(name == "shadow")
        candidate = policy((ports[2], ports[3]), "candidate", port)
        (folder / "candidate.yaml").write_text(yaml.safe_dump(candidate))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(baseline))
        file = str(folder / f"{name}.yaml")
        process = start(stack, [*disagg, "serve", file], env, folder / f"{name}.log")
        wait_ready(port, "/ready", "the gateway")
        if name != "off":
            command = [*disagg, "canary", "start", file]
            subprocess.run(command, env=env, check=True, timeout=60, capture_output=True)
        proxies.append(Proxy(name, port, process))
    return proxies


async def measure(rounds: int) -> dict[str, object]:
    costs: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        proxies = start_all(stack)
        for proxy in proxies:
            await load(proxy.port, payload(2, stream=True), 500, 8)
        for number in range(rounds):
            for shape, (tokens, count) in SHAPES.items():
                order = proxies if number % 2 == 0 else proxies[::-1]
                for proxy in order:
                    cost = await proxy.cost_us(payload(tokens, stream=True), count)
                    costs.setdefault(shape, {}).setdefault(proxy.name, []).append(cost)
            say(f"round {number + 1} of {rounds}")
    result: dict[str, object] = {"rounds": rounds}
    for shape, found in costs.items():
        medians = {name: statistics.median(values) for name, values in found.items()}
        result[shape] = {
            **{f"{name}_us": round(value) for name, value in medians.items()},
            **{
                f"{name}_ratio": round(
                    statistics.median(
                        a / b for a, b in zip(found[name], found["off"], strict=True)
                    ),
                    3,
                )
                for name in ("on", "shadow")
            },
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with runner:
        print(json.dumps(runner.run(measure(args.rounds))))


if __name__ == "__main__":
    main()
