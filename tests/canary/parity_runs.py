"""Simulated pairs of answers: what batching does to them, and what damage does besides (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from disagg_plugins.canary.answer import Difference
from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.canary.parity import Allowed, Parity

ALLOWED = Allowed(
    margin=0.03,
    early_margin=0.02,
    drift_ratio=1.25,
    drift_floor=0.03,
    edges=(512, 2048, 8192),
    min_pairs=30,
    fair_share=0.05,
)
LEVEL = 0.05

PROMPTS = ((100, 0.6), (1_000, 0.3), (4_000, 0.1))
"""Prompt tokens, and their share of the traffic."""

OUTPUT_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Pairs:
    """What pairs of one kind are like.

    Attributes:
        rate: Chance of parting, a token.
        drift: Median; None: clients ask for no log-probabilities.
    """

    rate: float = 0.0003
    drift: float | None = 0.02

    def draw(self, rng: np.random.Generator) -> Difference:
        """Return one pair."""
        drift = None if self.drift is None else self.drift * math.exp(0.7 * rng.standard_normal())
        position = int(rng.geometric(self.rate)) - 1 if self.rate else OUTPUT_TOKENS
        if position >= OUTPUT_TOKENS:
            return Difference("identical", None, None, drift, "ids")
        return Difference("different", position, None, drift, "ids")


SOUND = Pairs()


@dataclass(frozen=True, slots=True)
class Candidate:
    """What pairs with the candidate are like, by the length of prompts; others are sound."""

    pairs: Mapping[int, Pairs] = field(default_factory=dict)


def run(
    rng: np.random.Generator,
    candidate: Candidate,
    most: int,
    *,
    baseline: Pairs = SOUND,
    allowed: Allowed = ALLOWED,
    every: int = 25,
) -> tuple[str, int, Parity]:
    """Return the first answer that is not open, after how many pairs, and the evidence.

    Each pair is of the one or the other kind with equal chance; somebody looks every few pairs.
    """
    parity = Parity(allowed, LEVEL)
    lengths, shares = zip(*PROMPTS, strict=True)
    drawn = rng.choice(len(lengths), size=most, p=shares)
    for count, kind in enumerate(drawn, 1):
        tokens = lengths[kind]
        arm: Arm = ARMS[int(rng.random() < 0.5)]
        pairs = candidate.pairs.get(tokens, baseline) if arm == "candidate" else baseline
        parity.observe(arm, tokens, pairs.draw(rng))
        # seldom later on: a look costs more than a pair
        if count % max(every, count // 10) == 0 and (answer := parity.decide()) != "open":
            return answer, count, parity
    return parity.decide(), most, parity


def ends(candidate: Candidate, runs: int, most: int, **more: object) -> Sequence[tuple[str, int]]:
    """Return how many runs ended, each with a seed of its own."""
    found = []
    for seed in range(runs):
        answer, count, _ = run(np.random.default_rng(seed), candidate, most, **more)  # type: ignore[arg-type]
        found.append((answer, count))
    return found
