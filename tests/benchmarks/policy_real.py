"""The policy benchmark with real vLLM workers: one prefill and one decode against two whole ones.

Slow, and on two cores the workers disturb each other: it shows that the pretend workers' picture is
not upside down, no more. ``make bench NAME=policy ARGS=--real``. vllm-router is left out: its
handoffs need NIXL inside the engine, which is not part of this set-up.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.goodput import level
from tests.benchmarks.open_loop import Load
from tests.benchmarks.policy_arms import RULES, WHOLE, arms, scheduler_section
from tests.benchmarks.workloads import Ask, Slo, Workload, chat, code
from tests.engines.testbed import MODEL_NAME, ROOT, Server, Testbed

if TYPE_CHECKING:
    import argparse

FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "bfloat16")
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
SECONDS = 40.0
WARM_UP_S = 8.0
BOUND_S = 120.0

WORKLOADS = (
    Workload("chat", Slo(2.0, 0.15), (0.5,), 1, chat, "as with pretend workers, answers cut at 64"),
    Workload("code", Slo(1.5, 0.3), (0.8,), 1, code, "as with pretend workers"),
)
"""A step of this engine takes 46 ms on one core, 0.23 ms more for each prompt token."""


def asks(workload: Workload, seed: int, rate: float) -> list[Ask]:
    """Return requests that fit the model's context."""
    found = workload.asks(seed, rate, SECONDS)
    return [Ask(a.at_s, a.prompt[:4000], min(64, a.output_tokens)) for a in found]


def servers(roles: tuple[str, ...]) -> list[Server]:
    """Return two workers on a core each."""
    return [Server(f"w{i}", role, (i,)) for i, role in enumerate(roles)]


def measure_real(given: argparse.Namespace) -> dict[str, object]:
    """Run every rule before real workers; return the last line of the benchmark."""
    rules = arms([name for name in RULES if name in given.arms], prefills=1)
    goodput: dict[str, dict[str, float]] = {w.name: {} for w in WORKLOADS}
    levels: dict[str, dict[str, Any]] = {w.name: {} for w in WORKLOADS}
    with tempfile.TemporaryDirectory() as folder:
        for arm in rules:
            rule = arm.name
            roles = ("both", "both") if arm.roles == WHOLE else ("prefill", "decode")
            policy = {"scheduler": scheduler_section(arm.rule or "", WORKLOADS[0].slo)}
            place = Path(folder) / rule
            with Testbed(place, MODEL, servers(roles), flags=FLAGS, policy=policy, say=say) as bed:
                port = int(bed.gateway_url.rpartition(":")[2])
                for workload in WORKLOADS:
                    (rate,) = workload.rates
                    load = Load(port, 1.0, BOUND_S, model=MODEL_NAME, exact=False)
                    made = asks(workload, given.seed, rate)
                    outcomes = asyncio.run(load.run(made))
                    counted = [
                        o for a, o in zip(made, outcomes, strict=True) if a.at_s >= WARM_UP_S
                    ]
                    done = level(rate, counted, workload.slo)
                    goodput[workload.name][rule] = round(done.share, 3)
                    levels[workload.name][rule] = asdict(done)
                    say(f"{workload.name} {rule}: {done} {load.failures}")
    return {"goodput": goodput, "seed": given.seed, "real": True, "levels": levels}


def say(line: str) -> None:
    """Tell on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)
