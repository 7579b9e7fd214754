"""How often parity is judged wrongly, and how many pairs it takes to judge it rightly.

Simulates pairs of answers (``tests/canary/parity_runs``): 60 % of short prompts, 30 % of about
1,000 tokens, 10 % of 4,000. Somebody looks every 25 pairs at first, later after every tenth more.
What real damage does to a real model is measured by ``tests/engines/test_planted_damage.py``.

Run: ``make bench NAME=canary_parity`` (three minutes on two cores). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.canary.parity_runs import ALLOWED, OUTPUT_TOKENS, SOUND, Candidate, Pairs, run


def beyond(pairs: Pairs, more: float) -> Pairs:
    """Return pairs of which so much greater a share is different."""
    share = 1.0 - (1.0 - pairs.rate) ** OUTPUT_TOKENS + more
    return Pairs(1.0 - (1.0 - share) ** (1.0 / OUTPUT_TOKENS), pairs.drift)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of run."""

    name: str
    candidate: Candidate
    baseline: Pairs = SOUND
    most: int = 10_000


BARE = Pairs(SOUND.rate, None)
NOISY = Pairs(0.005, 0.2)
MARGIN = beyond(BARE, ALLOWED.margin)
SCENARIOS = (
    Scenario("alike, no noise", Candidate(), Pairs(0.0, None)),
    Scenario("alike, some noise", Candidate()),
    Scenario("alike, much noise", Candidate(), NOISY),
    Scenario("long prompts on the margin", Candidate({4_000: MARGIN}), BARE),
    Scenario("long prompts 10 % worse", Candidate({4_000: beyond(BARE, 0.1)}), BARE),
    Scenario("long prompts 30 % worse", Candidate({4_000: beyond(BARE, 0.3)}), BARE),
    Scenario("long prompts wrong at once", Candidate({4_000: Pairs(0.5, None)}), BARE),
    Scenario("long prompts drift twice as far", Candidate({4_000: Pairs(SOUND.rate, 0.04)})),
)


def one(task: tuple[int, int]) -> tuple[str, int]:
    """Run one scenario with one seed."""
    number, seed = task
    scenario = SCENARIOS[number]
    rng = np.random.default_rng((number, seed))
    answer, pairs, _ = run(rng, scenario.candidate, scenario.most, baseline=scenario.baseline)
    return answer, pairs


def main() -> int:
    """Run every scenario and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    runs = parser.parse_args()
    result = {}
    with multiprocessing.Pool(runs.processes) as pool:
        for number, scenario in enumerate(SCENARIOS):
            ends = pool.map(one, [(number, seed) for seed in range(runs.runs)], chunksize=5)
            answers = Counter(answer for answer, _ in ends)
            found = [pairs for answer, pairs in ends if answer == "worse"]
            median = statistics.median(found) if found else math.nan
            print(
                f"{scenario.name:<32} worse {answers['worse']:>4}  ok {answers['ok']:>4}  open "
                f"{answers['open']:>4}  of {runs.runs}; pairs until worse: {median:.0f}",
                flush=True,
            )
            result[scenario.name] = {**answers, "pairs": None if not found else median}
    print(json.dumps({"runs": runs.runs, "scenarios": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
