"""Do both arms say the same? Measured against how often the baseline contradicts itself (pure).

Pairs are the answers to a request and to its copy (``shadow``). Chance sends the copy to the
candidate, or to the baseline once more. Batching rounds differently each time, so the latter part
too; how often is measured, not assumed, and the candidate may exceed it by a margin only.

Each is judged in each bucket of prompt lengths by itself, for damage that shows in long prompts
alone would be thinned out by short ones:

- ``different``: the share of pairs that part other than at a tie. What promotion waits for.
- ``within N``: the share that does so within the first N tokens, for some N: together the places
  where answers first part. KV that was damaged on its way shows at once, rounding late: so the
  margin is narrower, and early partings condemn long before the rest would.
- ``drift p50``: the median difference of log-probabilities behind the same beginning, where
  clients ask for those. It sees damage that turned no token yet. Below a floor, which rounding
  alone may reach, it condemns nobody, however little the baseline drifts.

``worse`` in any bucket condemns; each of these is judged at level / their number (union bound).
``ok`` needs every bucket that has a fair share of the pairs. Verdicts hold however often one looks
(``comparison``); pairs that depend on each other count for less (``dependence``).

Copies that were never answered are no pairs: they speak of latency and errors, which other
guardrails watch, and are told beside the verdict.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from disagg_plugins.canary.comparison import Bound, QuantileComparison, mean_above, mean_below
from disagg_plugins.canary.guardrail import amount
from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.canary.state import integer, known, number
from disagg_plugins.canary.tally import AmountTally, ShareTally
from disagg_plugins.errors import DamagedState

if TYPE_CHECKING:
    from disagg_plugins.canary.answer import Difference
    from disagg_plugins.canary.guardrail import Answer, Figure

VERSION = 1
"""Of the stored state."""

WITHIN = (1, 4, 16, 64)
"""Tokens: damage shows in the first ones, and each is watched by itself, so few will do."""

DRIFT_QUANTILE = 0.5

LEAST_ODD = 3
"""Pairs that differ before a bucket without a fair share of them holds a step."""

TESTS_A_BUCKET = 1 + len(WITHIN) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """How much the candidate may differ beyond what the baseline does from itself.

    Args:
        margin: More of the pairs, from 0 to 1, that may be different.
        early_margin: More of them that may be so within the first tokens.
        drift_ratio: What the median drift may be of the baseline's.
        drift_floor: Up to this it is of no account, in log-probability.
        edges: Prompt tokens at which the next bucket begins, growing.
        min_pairs: Least pairs of each kind in a bucket before any verdict on it, in what they are
            worth as independent ones.
        fair_share: Of all pairs; a bucket that has less need not be ``ok``.

    Raises:
        ValueError: One of them cannot be.
    """

    margin: float
    early_margin: float
    drift_ratio: float
    drift_floor: float
    edges: tuple[int, ...]
    min_pairs: int
    fair_share: float

    def __post_init__(self) -> None:
        for share in (self.margin, self.early_margin, self.fair_share):
            if not 0.0 < share < 1.0:
                raise ValueError(f"{share!r} is no share between 0 and 1")
        if not 1.0 <= self.drift_ratio < math.inf or not 0.0 < self.drift_floor < math.inf:
            raise ValueError(f"a drift of {self.drift_ratio!r} times, from {self.drift_floor!r}")
        rising = all(a < b for a, b in zip((0, *self.edges), self.edges, strict=False))
        if not rising or self.min_pairs < 1:
            raise ValueError(f"edges {self.edges!r}, {self.min_pairs!r} pairs")

    @property
    def buckets(self) -> tuple[str, ...]:
        """What the buckets hold, in words."""
        if not self.edges:
            return ("all prompts",)
        middle = [f"{a} to {b - 1}" for a, b in zip(self.edges, self.edges[1:], strict=False)]
        return (f"prompts below {self.edges[0]} tokens",) + tuple(
            f"prompts of {words} tokens" for words in (*middle, f"{self.edges[-1]} and more")
        )


class _Bucket:
    """The pairs of one kind with prompts of about one length."""

    __slots__ = ("drift", "shares")

    def __init__(self) -> None:
        self.shares = {name: ShareTally() for name in SHARES}
        self.drift = AmountTally((DRIFT_QUANTILE,))

    def observe(self, difference: Difference) -> None:
        parted = math.inf
        if difference.likeness == "different" and difference.position is not None:
            parted = difference.position
        self.shares[DIFFERENT].observe(float(parted < math.inf))
        for tokens in WITHIN:
            self.shares[f"within {tokens}"].observe(float(parted < tokens))
        if difference.drift is not None:
            self.drift.observe(difference.drift)


DIFFERENT = "different"
DRIFT = "drift p50"
SHARES = (DIFFERENT, *(f"within {tokens}" for tokens in WITHIN))


@dataclass(frozen=True, slots=True)
class Finding:
    """What the evidence says of one aspect in one bucket.

    Attributes:
        aspect: ``different``, ``within N`` or ``drift p50``.
        bucket: In words.
        baseline: Of pairs whose copy went to the baseline again.
        candidate: Of pairs whose copy went to the candidate.
        required: Whether ``ok`` of all needs ``ok`` of this.
    """

    aspect: str
    bucket: str
    answer: Answer
    baseline: Figure
    candidate: Figure
    allowed: str
    required: bool

    @property
    def reason(self) -> str:
        """All of it in words for operators."""
        said = {
            "worse": "worse than allowed",
            "ok": "within what is allowed",
            "open": "not decided",
        }[self.answer]
        return (
            f"parity, {self.aspect}, {self.bucket}: {said}: the candidate's answers "
            f"{_pairs(self.candidate)}; the baseline's own {_pairs(self.baseline)}; allowed "
            f"{self.allowed}"
        )


def _pairs(figure: Figure) -> str:
    return figure.words("").replace("request", "pair")


@dataclass(frozen=True, slots=True)
class ParityJudgement:
    """What is known of parity.

    Attributes:
        answer: Of all together.
        reasons: The findings that decide it, in words.
        lost: Copies that were never answered, by kind.
    """

    answer: Answer
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    lost: dict[Arm, int]


class Parity:
    """The pairs of one canary; forgets nothing while it lasts, and keeps nothing but counts.

    Args:
        allowed: What may be; evidence gathered for other margins is refused.
        level: The chance that a candidate within the margins is ever found ``worse``; and that one
            beyond them in a bucket that counts is ever found ``ok``.

    Raises:
        ValueError: The level is no chance.
    """

    def __init__(self, allowed: Allowed, level: float) -> None:
        if not 0.0 < level < 1.0:
            raise ValueError(f"{level!r} is no chance between 0 and 1")
        self.allowed, self.level = allowed, level
        self._names = allowed.buckets
        self._needed_ok = math.log(1.0 / level)
        self._needed_worse = math.log(TESTS_A_BUCKET * len(self._names) / level)
        self._buckets: dict[Arm, list[_Bucket]] = {
            arm: [_Bucket() for _ in self._names] for arm in ARMS
        }
        self._lost: Counter[Arm] = Counter()
        bounds = Bound(allowed.drift_ratio, 0.0), Bound(0.0, allowed.drift_floor)
        self._drifts = [QuantileComparison(DRIFT_QUANTILE, bound) for bound in bounds]

    def observe(self, arm: Arm, prompt_tokens: int, difference: Difference) -> None:
        """Count one pair.

        Args:
            arm: Where the copy went; the request itself went to the baseline.
            prompt_tokens: Of the prompt; decides on the bucket.
            difference: Between the two answers.
        """
        bucket = bisect_right(self.allowed.edges, prompt_tokens)
        self._buckets[arm][bucket].observe(difference)

    def lose(self, arm: Arm) -> None:
        """Count a copy that was never answered."""
        self._lost[arm] += 1

    def pairs(self, arm: Arm) -> int:
        """Return how many pairs of a kind were counted."""
        return sum(bucket.shares[DIFFERENT].count for bucket in self._buckets[arm])

    def merge(self, other: Parity) -> None:
        """Add what another gateway counted of the same canary.

        Raises:
            ValueError: It has other margins.
        """
        if (other.allowed, other.level) != (self.allowed, self.level):
            raise ValueError("the evidence for other margins cannot be added")
        self._lost.update(other._lost)
        for arm in ARMS:
            for ours, theirs in zip(self._buckets[arm], other._buckets[arm], strict=True):
                ours.drift.merge(theirs.drift)
                for name, share in ours.shares.items():
                    share.merge(theirs.shares[name])

    def decide(self) -> Answer:
        """Return what the evidence says; takes a millisecond or two, so not for each pair."""
        every = [(i, aspect) for i in range(len(self._names)) for aspect in (*SHARES, DRIFT)]
        if any(self._is(i, aspect, "worse") for i, aspect in every):
            return "worse"
        counting = [i for i in range(len(self._names)) if self._counts(i)]
        if counting and all(self._is(i, DIFFERENT, "ok") for i in counting):
            return "ok"
        return "open"

    def waits_for(self) -> tuple[str, ...]:
        """Return, in words, why no step may be made yet though nothing is proven.

        Buckets without ``min_pairs`` have hardly been looked at: of those that have a fair share of
        the pairs; where there is no pair at all, all of them. And where answers differ more than
        they may so far, more pairs have to tell whether that is chance: an early look that proves
        nothing must not let damage pass.
        """
        least = self.allowed.min_pairs
        counting = [i for i in self._range() if self._counts(i)]
        if not counting:
            return (
                f"no two answers were compared yet ({least} pairs of each kind are needed): copies "
                "of greedy requests are, see canary.shadow",
            )
        found = []
        for i in counting:
            ours, theirs = (b.shares[DIFFERENT].count for b in self._row(i))
            if min(ours, theirs) < least:
                found.append(
                    f"parity, {self._names[i]}: {theirs} pairs with the candidate and {ours} of "
                    f"the baseline with itself, of {least} needed"
                )
        for i in self._range():
            found += self._suspicious(i)
        return tuple(found)

    def _suspicious(self, bucket: int) -> list[str]:
        """Say what differs more in a bucket than it may so far, proven or not.

        Rare buckets are long in telling: there it takes ``LEAST_ODD`` pairs that differ, and by
        more than a standard error, for one odd pair would hold the step for days.
        """
        found, rare = [], not self._counts(bucket)
        for aspect in SHARES:
            ours, theirs = (b.shares[aspect].figure(self.level) for b in self._row(bucket))
            if theirs.estimate is None:
                continue
            share, own = theirs.estimate, ours.estimate or 0.0
            chance = 0.0
            if rare:
                if share * theirs.count < LEAST_ODD - 0.5:
                    continue
                chance = math.sqrt(share * (1.0 - share) / theirs.count)
            if share > self._bound(aspect).of(own) + chance:
                found.append(
                    f"parity, {self._names[bucket]}: {aspect} in {amount(share)} of "
                    f"{theirs.count} pairs with the candidate, {amount(own)} of "
                    f"{ours.count} of the baseline with itself: more pairs have to tell"
                )
        return found

    def judge(self) -> ParityJudgement:
        """Return the same with all the numbers, for people."""
        findings = tuple(self._findings())
        answer = self.decide()
        told = [f for f in findings if f.answer == answer and (answer == "worse" or f.required)]
        lost = {arm: self._lost[arm] for arm in ARMS}
        return ParityJudgement(answer, tuple(f.reason for f in told), findings, lost)

    def _findings(self) -> Iterator[Finding]:
        for i, name in enumerate(self._names):
            ours, theirs = (self._buckets[arm][i] for arm in ARMS)
            for aspect in SHARES:
                figures = (
                    ours.shares[aspect].figure(self.level),
                    theirs.shares[aspect].figure(self.level),
                )
                words = f"{self._bound(aspect).offset:g} more of the pairs"
                required = aspect == DIFFERENT and self._counts(i)
                answer = self._answer(i, aspect)
                yield Finding(aspect, name, answer, *figures, words, required)
            if ours.drift.count or theirs.drift.count:
                figures = (
                    ours.drift.figure(DRIFT_QUANTILE, self.level),
                    theirs.drift.figure(DRIFT_QUANTILE, self.level),
                )
                allowed = self.allowed
                words = f"{allowed.drift_ratio:g} x the baseline's, and {allowed.drift_floor:g}"
                yield Finding(DRIFT, name, self._answer(i, DRIFT), *figures, words, False)

    def _answer(self, bucket: int, aspect: str) -> Answer:
        if self._is(bucket, aspect, "worse"):
            return "worse"
        return "ok" if self._is(bucket, aspect, "ok") else "open"

    def _bound(self, aspect: str) -> Bound:
        margin = self.allowed.margin if aspect == DIFFERENT else self.allowed.early_margin
        return Bound(1.0, margin)

    def _counts(self, bucket: int) -> bool:
        """Return whether a bucket has its fair share of the pairs; results are nothing to it."""
        pairs = [sum(b.shares[DIFFERENT].count for b in self._row(i)) for i in self._range()]
        return pairs[bucket] > 0 and pairs[bucket] >= self.allowed.fair_share * sum(pairs)

    def _range(self) -> range:
        return range(len(self._names))

    def _row(self, bucket: int) -> list[_Bucket]:
        return [self._buckets[arm][bucket] for arm in ARMS]

    def _is(self, bucket: int, aspect: str, answer: Literal["worse", "ok"]) -> bool:
        """Return whether so much is proven."""
        needed = self._needed_worse if answer == "worse" else self._needed_ok
        rows, least = self._row(bucket), self.allowed.min_pairs
        if aspect == DRIFT:
            drifts = [row.drift for row in rows]
            factors = drifts[0].factor(DRIFT_QUANTILE), drifts[1].factor(DRIFT_QUANTILE)
            if any(d.count < least * f for d, f in zip(drifts, factors, strict=True)):
                return False
            arms = drifts[0].values, drifts[1].values
            # above the greater of two bounds is above both; below it, of which each may err half
            if answer == "worse":
                return all(c.above(*arms, needed, factors) for c in self._drifts)
            needed += math.log(2.0)
            return any(c.below(*arms, needed, factors) for c in self._drifts)
        shares = [row.shares[aspect] for row in rows]
        factors = shares[0].factor(), shares[1].factor()
        if any(s.count < least * f for s, f in zip(shares, factors, strict=True)):
            return False
        judge = mean_above if answer == "worse" else mean_below
        return judge(shares[0].share, shares[1].share, self._bound(aspect), needed, factors)

    def as_dict(self) -> dict[str, object]:
        """Return the evidence as plain values, for JSON."""
        return {
            "version": VERSION,
            "level": self.level,
            "allowed": {**asdict(self.allowed), "edges": list(self.allowed.edges)},
            "lost": {arm: self._lost[arm] for arm in ARMS},
            **{
                arm: [
                    {
                        "shares": {name: s.as_dict() for name, s in bucket.shares.items()},
                        "drift": bucket.drift.as_dict(),
                    }
                    for bucket in self._buckets[arm]
                ]
                for arm in ARMS
            },
        }

    @staticmethod
    def from_dict(state: object, allowed: Allowed, level: float) -> Parity:
        """Return the evidence of ``as_dict``, for the same margins and level.

        Raises:
            DamagedState: It is anything else, or was gathered for others.
        """
        result = Parity(allowed, level)
        keys = ("version", "level", "allowed", "lost", *ARMS)
        plain = known(state, keys, "the evidence of parity")
        if integer(plain["version"], 0, None, "its version") != VERSION:
            raise DamagedState(f"its version is {plain['version']!r}, not {VERSION}")
        if number(plain["level"], 0.0, 1.0, "the level") != level:
            raise DamagedState(f"it was gathered at level {plain['level']!r}, not {level!r}")
        if plain["allowed"] != {**asdict(allowed), "edges": list(allowed.edges)}:
            raise DamagedState("it was gathered for other margins")
        lost = known(plain["lost"], ARMS, "the copies that were lost")
        for arm in ARMS:
            result._lost[arm] = integer(lost[arm], 0, None, "a count of copies")
            stored = plain[arm]
            if not isinstance(stored, list) or len(stored) != len(result._names):
                raise DamagedState(f"{len(result._names)} buckets of the {arm} are expected")
            for bucket, item in zip(result._buckets[arm], stored, strict=True):
                each = known(item, ("shares", "drift"), "a bucket")
                shares = known(each["shares"], SHARES, "the shares of a bucket")
                bucket.shares = {name: ShareTally.from_dict(shares[name]) for name in SHARES}
                bucket.drift = AmountTally.from_dict(each["drift"], (DRIFT_QUANTILE,))
        return result
