"""How many routes a second one core decides, by the size of the fleet.

Every built-in scheduler plugin is on. Loads move as requests begin and end, as in the gateway. The
quality of what is decided is told beside the rate: how much fuller the fullest worker is than the
mean, for the sample and, where that ends in this life, for looking at every worker.

Run: ``make bench NAME=decisions``, which measures the compiled build as well where it can be made.
Last line: ``{"per_s": {"4": ..., "64": ...}, "build": ..., "pure_per_s": {...}}``; ``per_s`` is of
the compiled build where that was measured, and only then ``pure_per_s`` is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.build_kind import build_kind
from disagg_plugins.gateway.app import GC_YOUNG_OBJECTS
from disagg_plugins.gateway.fleet import FleetState, Work
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy, SchedulerPolicy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.scheduling.weights import DEFAULT_WEIGHTS
from disagg_plugins.types import Disaggregated, RequestProfile, Role, Worker
from disagg_vllm.dialect import VllmDialect

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (4, 64, 1024, 10_000)
CANDIDATES = SchedulerPolicy.model_fields["candidates"].default

IN_FLIGHT = 8
"""Requests a worker, on average."""

PROFILE = Path(__file__).with_name("profile.yaml")
"""DistServe's fit of OPT-13B on one A100: the SLO rule predicts from the first request on."""

ALL_AT_MOST = 1024
"""Larger fleets are not compared with looking at all: a decision takes some 10 ms there."""


def fleet_of(size: int) -> FleetState:
    """Return a healthy fleet: half prefill, half decode."""
    workers = tuple(
        Worker(
            f"w{i}",
            f"http://127.0.0.1:{1 + i}",
            "vllm",
            (Role.PREFILL, Role.DECODE)[i % 2],
            labels={"host": f"h{i // 8}", "zone": f"z{i // 512}"},
            kv_tokens=100_000,
        )
        for i in range(size)
    )
    state = FleetState(workers, {"vllm": VllmDialect()}, model="m", unhealthy_after=3)
    for worker in workers:
        state.probe_ok(worker.name, ("m",))
    return state


def policy(candidates: int, rule: str) -> Policy:
    """Return a policy with every built-in scorer on."""
    return Policy.model_validate(
        {
            "fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]},
            "scheduler": {
                "split": {"rule": rule},
                "profile": str(PROFILE),
                "slo_classes": {"chat": {"ttft_s": 1.0, "tpot_s": 0.05}},
                "weights": dict.fromkeys(DEFAULT_WEIGHTS, 1.0),
                "candidates": candidates,
            },
        }
    )


def profiles(seed: int) -> Iterator[RequestProfile]:
    """Yield requests: 64 shared prefixes, prompts of 300 to 4,000 tokens, 256 sessions."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        tokens = int(draw.triangular(300, 4000, 800))
        shared = draw.randrange(64)
        hashes = [f"{shared}-{i}" for i in range(4)] + [f"{number}-{i}" for i in range(4)]
        yield RequestProfile(
            str(number), "/v1/completions", "m", tokens, True, 256,
            prefix_hashes=hashes, session=str(draw.randrange(256)), slo_class="chat",
            ttft_slo_s=1.0, tpot_slo_s=0.05,
            cached_tokens={f"w{shared % 4}": 256, f"w{shared % 4 + 1}": 128},
        )  # fmt: skip


def rate(size: int, candidates: int, rule: str, seconds_s: float, seed: int) -> tuple[float, float]:
    """Return decisions a second of CPU, and the fullest decode worker over the mean."""
    state, stream = fleet_of(size), profiles(seed)
    running: deque[tuple[str, Work]] = deque()
    bound = IN_FLIGHT * size // 2
    given = policy(candidates, rule)
    with PluginHost.load(given.plugins, entry_points=False) as host:
        scheduler = Scheduler(host, given, seed=seed)
        requests = [next(stream) for _ in range(20_000)]
        done, spent_s, peaks = 0, 0.0, []
        warm = bound
        gc.collect()
        gc.freeze()  # as the gateway does
        gc.set_threshold(GC_YOUNG_OBJECTS, 20, 20)
        while spent_s < seconds_s or done < 2 * warm:
            profile = requests[(done + warm) % len(requests)]
            started_s = time.process_time()
            route = scheduler.decide(profile, state.view()).route
            spent_s += time.process_time() - started_s
            work = Work(0, profile.prompt_tokens, 256)
            if isinstance(route, Disaggregated):
                reading = Work(profile.prompt_tokens, profile.prompt_tokens)
                state.begin(route.prefill.name, reading)
                running.append((route.prefill.name, reading))
            state.begin(route.decode.name, work)
            running.append((route.decode.name, work))
            while len(running) > 2 * bound:
                state.end(*running.popleft())
            done += 1
            if done % 512 == 0 and done > warm:
                loads = [s.requests for s in state.states.values() if s.worker.role is Role.DECODE]
                peaks.append(max(loads) / statistics.fmean(loads))
        if host.counts:
            raise RuntimeError(f"plugins failed: {host.counts}")
    return done / spent_s, statistics.fmean(peaks) if peaks else 0.0


COMPILED_TIMEOUT_S = 1800.0
"""Far beyond what measuring the other build takes."""


def measured_by(python: Path, arguments: list[str]) -> dict[str, float]:
    """Return the rates that another environment, with the compiled build, measures.

    Raises:
        RuntimeError: It is not the compiled build.
    """
    command = [str(python), __file__, *arguments]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environ, check=True,
        timeout=COMPILED_TIMEOUT_S,
    )  # fmt: skip
    *lines, last = ran.stdout.splitlines()
    found = json.loads(last)
    print("\n".join(lines), flush=True)
    if found["build"] != "compiled":
        raise RuntimeError(f"{python} runs the {found['build']} build, not the compiled one")
    rates: dict[str, float] = found["per_s"]
    return rates


def main() -> None:
    """Measure every size and print the rates."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time of each measurement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rule", default="slo")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--compiled", type=Path, help="Python of an environment with that build")
    given = parser.parse_args()
    per_s: dict[str, float] = {}
    print(f"{build_kind()} build", flush=True)
    for size in given.sizes:
        sampled, peak = rate(size, CANDIDATES, given.rule, given.seconds, given.seed)
        per_s[str(size)] = round(sampled)
        line = f"{size:6} workers  {sampled:8.0f} decisions/s  {1e6 / sampled:7.1f} us"
        line += f"  fullest/mean {peak:.2f}"
        if size <= ALL_AT_MOST:
            every, level = rate(size, 4096, given.rule, min(2.0, given.seconds), given.seed)
            line += f"  (all compared: {every:.0f}/s, fullest/mean {level:.2f})"
        print(line, flush=True)
    result: dict[str, object] = {"per_s": per_s, "build": build_kind()}
    if given.compiled is not None:
        arguments = ["--seconds", str(given.seconds), "--seed", str(given.seed)]
        arguments += ["--rule", given.rule, "--sizes", *map(str, given.sizes)]
        compiled = measured_by(given.compiled, arguments)
        result = {"per_s": compiled, "build": "compiled", "pure_per_s": per_s}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
