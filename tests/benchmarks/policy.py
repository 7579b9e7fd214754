"""What a split rule is worth: the share of requests within their SLO, rule by rule, load by load.

``make bench NAME=policy``. Four pretend workers serve every arm: some for prefill and the others
for decode, or four that do both (``never``, ``slo-both``, ``vllm-router-whole``). They take a
measured engine's time (``pace.py``, by default OPT-13B on an A100 as DistServe fitted it), so that
the result is about decisions. Arrivals are Poisson with a fixed seed, or a stretch of a public
trace whose times are scaled to the load; the loop is open. Workers run in one process, each proxy
and the load generator in their own; the CPU of each is told, and time runs ``--speed`` times as
fast as the clock as long as none of them needs a core. After the levels of a workload every arm
runs once more at the load at which the best one drops to 90 %: those shares are what the last line
holds, one JSON object.

``--real`` does the same with real vLLM workers, smaller: one prefill and one decode against two.

    .venvs/bench/bin/python tests/benchmarks/policy.py [--workloads chat code] [--speed 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.goodput import WANTED, Level, level, percentile, rate_at
from tests.benchmarks.open_loop import Load
from tests.benchmarks.policy_arms import (
    ALONE,
    ROOT,
    ROUTERS,
    RULES,
    WORKERS,
    Running,
    arms,
    cpu_s,
    start_arm,
    start_workers,
)
from tests.benchmarks.workloads import Slo, Workload, workloads

ANCHORS = Path(os.environ.get("DISAGG_ANCHORS") or ROOT.parent / "shared" / "anchors")
WARM_UP_S = 10.0
"""Requests that arrive earlier fill the batches and the prefix caches; they do not count."""

BOUND_S = 120.0
BEYOND = 1.3
REFINEMENTS = 2
"""Levels beyond the workload's own, each where the best arm seems to drop to 90 %."""

LATE_SHARE = 0.1
"""Of the TTFT bound: where one request in 50 leaves later than this, the machine did something else
meanwhile, and the level is measured again."""

EQUAL = 0.03
"""Rates nearer to each other than this are called equal: about what another seed changes."""

ATTEMPTS = 3
AGAIN_S = 420.0
"""No level is measured again after this."""

BUSY = 0.9
"""A process that needs more of a core than this decides the result itself: it is told."""

BEGAN_S = time.monotonic()


def say(line: str) -> None:
    """Tell on stderr how far it is."""
    print(f"[{time.monotonic() - BEGAN_S:5.1f} s] {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Setting:
    """How it is measured."""

    seed: int
    seconds: float
    speed: float
    parallel: int
    profile: str
    interval: int


class Bench:
    """Runs workloads against arms."""

    def __init__(
        self, setting: Setting, names: Sequence[str], folder: Path, stack: ExitStack
    ) -> None:
        self.setting = setting
        self.names = names
        self.folder = folder
        count = WORKERS * len(names)
        self.first_port, self.workers = start_workers(
            stack, folder, count, setting.profile, setting.speed, setting.interval
        )
        self.busiest: dict[str, float] = {}
        self.late_s = 0.0
        self.failures: dict[str, list[str]] = {}

    def run(self, workload: Workload) -> tuple[dict[str, list[Level]], float]:
        """Return the levels of each arm, the last one at the load where the best drops to 90 %."""
        speed = self.setting.speed
        slo = Slo(workload.slo.ttft_s / speed, workload.slo.tpot_s / speed)  # of the clock
        found: dict[str, list[Level]] = {name: [] for name in self.names}
        best = 0.0
        with ExitStack() as stack:
            running, port = [], self.first_port
            for arm in arms(self.names, workload.prefills):
                profile = self.setting.profile
                running.append(start_arm(stack, self.folder, arm, port, slo, profile))
                port += len(arm.roles)
            for each in running:
                each.wait()
            for rate in workload.rates:
                self._level(workload, rate, running, found)
                if all(levels[-1].share < WANTED / 2 for levels in found.values()):
                    break  # nothing is left to see at higher loads
            for _ in range(REFINEMENTS):
                best = max(rate_at(levels) for levels in found.values())
                if best >= max(each.rate for levels in found.values() for each in levels):
                    best *= BEYOND  # nobody has given way yet
                self._level(workload, best, running, found)
        return found, best

    def _level(
        self, workload: Workload, rate: float, running: list[Running], found: dict[str, list[Level]]
    ) -> None:
        size = self.setting.parallel
        for at in range(0, len(running), size):
            group = running[at : at + size]
            done, late_s = self._attempts(workload, rate, group)
            self.late_s = max(self.late_s, late_s / workload.slo.ttft_s)
            for arm, each in zip(group, done, strict=True):
                found[arm.arm.name].append(each)
        shares = "  ".join(f"{name} {levels[-1].share:.2f}" for name, levels in found.items())
        say(f"{workload.name} {rate:.2f}/s: {shares}")

    def _attempts(
        self, workload: Workload, rate: float, group: list[Running]
    ) -> tuple[list[Level], float]:
        """Return the levels of the attempt that the machine disturbed least, and how late."""
        tried: list[tuple[list[Level], float]] = []
        while len(tried) < ATTEMPTS:
            tried.append(uvloop.run(self._arms(workload, rate, group)))
            if tried[-1][1] <= LATE_SHARE * workload.slo.ttft_s:
                break
            say(f"the machine was busy: requests left {tried[-1][1]:.2f} virtual s late")
            if time.monotonic() - BEGAN_S > AGAIN_S:
                break
        return min(tried, key=lambda each: each[1])

    async def _arms(
        self, workload: Workload, rate: float, group: list[Running]
    ) -> tuple[list[Level], float]:
        setting = self.setting
        asks = workload.asks(setting.seed, rate, setting.seconds)
        loads = [Load(r.port, setting.speed, BOUND_S) for r in group]
        watched = {"workers": self.workers, "load generator": psutil.Process()}
        watched |= {r.arm.name: r.process for r in group}
        before = {name: cpu_s(process) for name, process in watched.items()}
        begin_s = time.monotonic()
        outcomes = await asyncio.gather(*(load.run(asks) for load in loads))
        took_s = time.monotonic() - begin_s
        for name, process in watched.items():
            share = (cpu_s(process) - before[name]) / took_s
            self.busiest[name] = max(self.busiest.get(name, 0.0), share)
        counted = [i for i, ask in enumerate(asks) if ask.at_s >= WARM_UP_S]
        for load, r in zip(loads, group, strict=True):
            if load.failures:
                self.failures[f"{workload.name} {rate:.2f} {r.arm.name}"] = load.failures
        late_s = max(percentile(load.late_s, 0.98) for load in loads)
        return [level(rate, [o[i] for i in counted], workload.slo) for o in outcomes], late_s


def table(workload: Workload, found: dict[str, list[Level]], best: float, num_workers: int) -> None:
    """Print one workload's figures."""
    slo, prefills = workload.slo, workload.prefills
    print(
        f"\n{workload.name}: {workload.about}. TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s. "
        f"Split fleets: {prefills} prefill, {WORKERS - prefills} decode"
    )
    for name, levels in found.items():
        grid, last = sorted(levels[:-1], key=lambda each: each.rate), levels[-1]
        shares = "  ".join(f"{each.rate:.3g}/s {100 * each.share:3.0f} %" for each in grid)
        print(
            f"  {name:<18} {rate_at(levels) / num_workers:6.3f} req/s a worker at 90 %;  {shares};"
            f"  at {best:.2f}/s {100 * last.share:.0f} %, TTFT p50 {last.ttft_p50_s:.2f} p90 "
            f"{last.ttft_p90_s:.2f}, TPOT p50 {1000 * last.tpot_p50_s:.0f} p90 "
            f"{1000 * last.tpot_p90_s:.0f} ms, {last.failed} of {last.requests} failed"
        )


def verdict(rates: dict[str, float]) -> str:
    """Say whether splitting wins on a workload, and by how much."""
    split = {name: rate for name, rate in rates.items() if name not in ALONE}
    alone = {name: rate for name, rate in rates.items() if name in ALONE}
    if not split or not alone:
        return "nothing to compare"
    best, plain = max(split, key=lambda n: split[n]), max(alone, key=lambda n: alone[n])
    ratio = split[best] / max(alone[plain], 1e-9)
    word = "wins" if ratio > 1 + EQUAL else "loses" if ratio < 1 - EQUAL else "changes nothing"
    return f"splitting {word}: {best} carries {ratio:.2f} times what {plain} does"


def measure(given: argparse.Namespace) -> dict[str, object]:
    """Run what was asked for; return the last line."""
    setting = Setting(
        given.seed, given.seconds, given.speed, given.parallel, given.profile, given.interval
    )
    chosen = [w for w in workloads(given.anchors) if w.name in given.workloads]
    for name in sorted(set(given.workloads) - {w.name for w in chosen}):
        say(f"left out: {name}, its trace is not in {given.anchors}")
    picked = [a.name for a in arms(given.arms, prefills=1)]
    for name in sorted(set(given.arms) - set(picked)):
        say(f"left out: {name}, which this version or environment does not have")
    goodput: dict[str, dict[str, float]] = {}
    result: dict[str, object] = {"goodput": goodput}
    at_best: dict[str, float] = {}
    per_worker: dict[str, dict[str, float]] = {}
    verdicts: dict[str, str] = {}
    levels: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(setting, picked, Path(folder), stack)
        for workload in chosen:
            found, best = bench.run(workload)
            table(workload, found, best, WORKERS)
            rates = {name: rate_at(each) for name, each in found.items()}
            at_best[workload.name] = round(best, 3)
            goodput[workload.name] = {n: round(each[-1].share, 3) for n, each in found.items()}
            per_worker[workload.name] = {n: round(r / WORKERS, 3) for n, r in rates.items()}
            verdicts[workload.name] = verdict(rates)
            print(f"  {verdicts[workload.name]}")
            levels[workload.name] = {
                n: [{k: round(v, 4) for k, v in asdict(e).items()} for e in each]
                for n, each in found.items()
            }
        busiest = {name: round(share, 2) for name, share in bench.busiest.items()}
        for name, share in busiest.items():
            if share > BUSY:
                print(f"{name} needed {share:.2f} of a core: run again with a lower --speed")
        if bench.late_s > LATE_SHARE:
            print(f"the machine was busy: a level is off by up to {bench.late_s:.2f} TTFT bounds")
        for where, failures in bench.failures.items():
            say(f"failed, {where}: {failures}")
        result |= {
            "requests_per_s": at_best,
            "requests_per_s_a_worker_at_90": per_worker,
            "verdict": verdicts,
            "cpu_cores": busiest,
            "departures_late_p98_of_ttft_bound": round(bench.late_s, 3),
        }
    result |= {"seed": given.seed, "profile": given.profile, "speed": given.speed}
    result |= {"workers": WORKERS, "seconds": given.seconds, "levels": levels}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = ("chat", "summarise", "code", "azure-conv")
    parser.add_argument("--workloads", nargs="+", default=names, help="also: mooncake")
    parser.add_argument("--arms", nargs="+", default=(*RULES, *ROUTERS))
    parser.add_argument("--anchors", type=Path, default=ANCHORS, help="the folder of the traces")
    parser.add_argument("--profile", default="opt-13b-a100")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=45.0, help="virtual, of one level")
    parser.add_argument("--speed", type=float, default=3.0, help="virtual seconds a second")
    parser.add_argument("--interval", type=int, default=8, help="tokens of one piece of a stream")
    parser.add_argument("--parallel", type=int, default=8, help="arms that run at once")
    parser.add_argument("--real", action="store_true", help="real vLLM workers")
    given = parser.parse_args()
    if given.real:
        from tests.benchmarks.policy_real import measure_real

        print(json.dumps(measure_real(given)))
        return
    say(f"seed {given.seed}, profile {given.profile}, {given.speed:g} times as fast as the clock")
    print(json.dumps(measure(given)))


if __name__ == "__main__":
    main()
