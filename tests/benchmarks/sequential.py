"""How often a canary is judged wrongly, and how many requests it takes to judge it rightly.

Simulates whole rollouts (``rollouts``), looked at every 10 requests at first and every 4 % later:
candidates as good as the baseline, candidates exactly on a margin, and candidates with a regression
of 20 % in one metric. Then compares the widths of intervals that hold at all times with those of
the usual kind, which hold at one sample size fixed beforehand.

Run: ``make bench NAME=sequential`` (five minutes on two free cores). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disagg_plugins.canary.confidence import Share, quantile_interval, share_interval
from disagg_plugins.canary.histogram import Histogram
from tests.benchmarks.rollouts import ERRORS, HEALTHY, End, Fault, guarded, rollout

if TYPE_CHECKING:
    from disagg_plugins.canary.guardrail import Guardrail

LEVEL = 0.05
MARGIN = 1.1
REGRESSION = 1.2

ON_MARGIN = {
    "ttft": Fault({"ttft": MARGIN}),
    "tpot": Fault({"tpot": MARGIN}),
    "e2e": Fault({"e2e": MARGIN}),
    "goodput": Fault({"goodput": 0.95}),
    "error_rate": Fault(errors=0.01),
}

PLANTED = {
    "ttft": Fault({"ttft": REGRESSION}),
    "tpot": Fault({"tpot": REGRESSION}),
    "e2e": Fault({"e2e": REGRESSION}),
    "goodput": Fault({"goodput": 0.8}),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of rollout."""

    guardrails: tuple[Guardrail, ...]
    fault: Fault
    most: int


def one(scenario: Scenario, seed: int) -> End:
    """Run one rollout of a scenario."""
    rng = np.random.default_rng(seed)
    return rollout(rng, scenario.guardrails, LEVEL, scenario.most, scenario.fault)


def share(ends: list[End], action: str) -> float:
    """Return the share of rollouts that ended so."""
    return sum(end.action == action for end in ends) / len(ends)


def samples(ends: list[End], action: str) -> int | None:
    """Return the median number of requests of each arm of those that ended so."""
    found = [end.samples for end in ends if end.action == action]
    return round(statistics.median(found)) if found else None


def line(what: str, ends: list[End]) -> None:
    """Print one scenario."""
    print(
        f"{what:44} rollback {share(ends, 'rollback'):6.3f}  promote {share(ends, 'promote'):6.3f}"
        f"  median requests an arm: rollback {samples(ends, 'rollback')},"
        f" promote {samples(ends, 'promote')}",
        flush=True,
    )


def widths(seed: int) -> dict[str, dict[str, float]]:
    """Return widths of intervals over those of the usual kind at 95 %, for some sample sizes."""
    rng = np.random.default_rng(seed)
    z = statistics.NormalDist().inv_cdf(1 - LEVEL / 2)
    found: dict[str, dict[str, float]] = {}
    for mean in (0.5, 0.1, 0.01):
        row = {}
        for count in (100, 1_000, 10_000):
            low, high = share_interval(Share(count, round(mean * count)), LEVEL)
            wilson = z * math.sqrt(mean * (1 - mean) / count + (z / count / 2) ** 2)
            row[str(count)] = round((high - low) / (2 * wilson / (1 + z * z / count)), 2)
        found[f"share {mean:g}"] = row
    for quantile in (0.5, 0.9, 0.99):
        row = {}
        for count in (100, 1_000, 10_000):
            ratios = []
            for _ in range(40):
                values = np.sort(rng.lognormal(-1.4, 0.6, count))
                low, high = quantile_interval(Histogram.of(values), quantile, LEVEL)
                spread = z * math.sqrt(count * quantile * (1 - quantile))
                first = math.floor(count * quantile - spread) - 1
                last = math.ceil(count * quantile + spread) - 1
                if first < 0 or last >= count or low <= 0.0 or math.isinf(high):
                    ratios.append(math.inf)  # one of the two has no end yet
                else:
                    ratios.append(math.log(high / low) / math.log(values[last] / values[first]))
            ratio = statistics.median(ratios)
            row[str(count)] = round(ratio, 2) if math.isfinite(ratio) else None
        found[f"p{100 * quantile:g}"] = row
    return found


def main() -> None:
    """Simulate, print each scenario, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1_000, help="rollouts of each kind")
    parser.add_argument("--most", type=int, default=10_000, help="most requests of each arm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    started_s, total = time.monotonic(), 0
    strict, lenient = tuple(guarded(1.0)), tuple(guarded(MARGIN))

    with multiprocessing.Pool(given.processes) as pool:

        def run(what: str, scenario: Scenario, part: float = 1.0) -> list[End]:
            nonlocal total
            runs = max(1, round(given.runs * part))
            seeds = range(given.seed + total, given.seed + total + runs)
            total += runs
            ends = pool.starmap(one, zip(repeat(scenario), seeds), chunksize=5)
            line(what, ends)
            return ends

        same = run("same, margins 10 %", Scenario(lenient, HEALTHY, given.most))
        edge = run("same, no margin (on the boundary)", Scenario(strict, HEALTHY, given.most))
        on_margin = {
            name: run(
                f"on the margin: {name}",
                Scenario(tuple(guarded(MARGIN, name)), fault, given.most),
                0.2,
            )
            for name, fault in ON_MARGIN.items()
        }
        planted = {
            name: run(
                f"20 % worse, margins 10 %: {name}", Scenario(lenient, fault, given.most), 0.25
            )
            for name, fault in PLANTED.items()
        }
        strictly = {
            name: run(f"20 % worse, no margin: {name}", Scenario(strict, fault, given.most), 0.1)
            for name, fault in PLANTED.items()
        }
        more = {
            f"{ERRORS + extra:.0%}": run(
                f"errors {ERRORS:.0%} -> {ERRORS + extra:.0%}, one point allowed",
                Scenario(lenient, Fault(errors=extra), given.most),
                0.1,
            )
            for extra in (0.02, 0.04, 0.09)
        }
        dependent = {
            f"{memory:g}": run(
                f"same, no margin, requests depend: {memory:g}",
                Scenario(strict, Fault(memory=memory), given.most),
                0.1,
            )
            for memory in (0.3, 0.6, 0.9)
        }

    fooled = sum(end.z_test_rolls_back for end in edge) / len(edge)
    print(f"a usual z-test of the errors, looked at as often, rolls back {fooled:.3f} of the same")
    ratios = widths(given.seed)
    for name, row in ratios.items():
        print(f"width over the usual, {name:10} {row}")
    print(f"{time.monotonic() - started_s:.0f} s")
    detected = [end for ends in planted.values() for end in ends]
    print(
        json.dumps(
            {
                "level": LEVEL,
                "false_rollback_rate": max(share(same, "rollback"), share(edge, "rollback")),
                "false_promotion_rate": max(share(e, "promote") for e in on_margin.values()),
                "detected_20pct_rate": share(detected, "rollback"),
                "median_samples": samples(detected, "rollback"),
                "runs": total,
                "median_samples_to_promote": samples(same, "promote"),
                "median_samples_by_metric": {n: samples(e, "rollback") for n, e in planted.items()},
                "detected_by_metric": {n: share(e, "rollback") for n, e in planted.items()},
                "median_samples_no_margin": {
                    n: samples(e, "rollback") for n, e in strictly.items()
                },
                "median_samples_errors": {n: samples(e, "rollback") for n, e in more.items()},
                "false_rollback_if_requests_depend": {
                    n: share(e, "rollback") for n, e in dependent.items()
                },
                "false_rollback_of_a_usual_test": fooled,
                "width_over_fixed_n": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
