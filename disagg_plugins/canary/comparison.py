"""Whether one arm is proven to lie beyond what the other allows, at any time (pure).

Two intervals that do not touch prove a difference, but each of them must then bear half the error
and the gap must be as wide as both. Here the arms are taken together: their requests are different
ones, so the evidence (``evidence``) against any *pair* of true values multiplies and is still a
supermartingale, however the traffic was split meanwhile as long as no split looked ahead. "The
candidate lies above what is allowed" is proven when the product reaches 1/level for every pair in
which it does not. Evidence falls with the distance, so the pairs on the boundary decide:
``candidate = bound(baseline)``, a search along one line. For shares of 10 % and 15 % this takes
half the requests of two intervals at equal traffic, and two thirds where the baseline has nine
times as many.

For means the evidence along the line is convex, so the search is exact. For quantiles every bin is
tried, each rounded to the side that proves less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.evidence import CoinEvidence, log_above, log_below
from disagg_plugins.canary.histogram import LOWER, NUM_BINS, UPPER, Histogram

if TYPE_CHECKING:
    import numpy.typing as npt

    from disagg_plugins.canary.confidence import Share
    from disagg_plugins.canary.evidence import Counts, Logs

    Bins = npt.NDArray[np.int64]

GOLDEN = 0.6180339887498949
"""Of the golden-section search (Kiefer 1953)."""

SHRINKS = 60
"""Of the search: the interval is then 1e-12 of what it was."""

SLACK = 1e-6
"""What rounding in the search could have gained, many times over."""

LIKELY = (0.5, 0.25, 0.75)
"""Where between what the arms seem to have a search looks first: where nothing is proven yet, one
of these nearly always shows it."""

PROBES = 8
"""Bins that are tried before all others: where nothing is proven yet, one of them nearly always
shows it, at a hundredth of the cost."""


Factors = tuple[float, float]
ALONE: Factors = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Bound:
    """What the candidate may have, of what the baseline has: ``ratio * baseline + offset``.

    Args:
        ratio: Greater than 0, or 0 for a fixed limit, to which the baseline is nothing.
        offset: In the metric's own unit.
    """

    ratio: float
    offset: float

    def of(self, baseline: float) -> float:
        """Return the bound for a value of the baseline."""
        return self.ratio * baseline + self.offset if self.ratio else self.offset

    def baseline(self, value: float) -> float:
        """Return the baseline's value that ``value`` is the bound for; a fixed limit has none."""
        return (value - self.offset) / self.ratio


def mean_above(
    baseline: Share, candidate: Share, bound: Bound, needed: float, factors: Factors = ALONE
) -> bool:
    """Return whether the candidate's mean is proven to lie above the bound.

    Args:
        needed: The log of 1/level.
        factors: How many requests of each arm are worth one (see ``dependence``).
    """
    ours, theirs = _worth(baseline, factors[0]), _worth(candidate, factors[1])
    if not bound.ratio:
        if bound.offset < 0.0:
            return True
        return log_above(*theirs, min(1.0, bound.offset)) >= needed
    least = max(0.0, -bound.offset / bound.ratio)  # below it every candidate lies above the bound
    ends = _seeming(ours), bound.baseline(_seeming(theirs))
    if least <= ends[0] and ends[1] <= ends[0]:
        return False  # it does not even seem so: nothing speaks against the two estimates

    def evidence(mean: float) -> float:
        # the baseline lies below ``mean``, and the candidate above what that allows
        other = min(1.0, max(0.0, bound.of(mean)))
        return log_below(*ours, mean) + log_above(*theirs, other)

    return _least_reaches(evidence, (least, 1.0), ends, needed)


def mean_below(
    baseline: Share, candidate: Share, bound: Bound, needed: float, factors: Factors = ALONE
) -> bool:
    """Return whether the candidate's mean is proven to lie below the bound; see ``mean_above``."""
    ours, theirs = _worth(baseline, factors[0]), _worth(candidate, factors[1])
    if not bound.ratio:
        if bound.offset > 1.0:
            return True
        return log_below(*theirs, max(0.0, bound.offset)) >= needed
    most = min(1.0, bound.baseline(1.0))  # above it every candidate lies below
    ends = _seeming(ours), bound.baseline(_seeming(theirs))
    if ends[0] <= most and ends[0] <= ends[1]:
        return False

    def evidence(mean: float) -> float:
        other = min(1.0, max(0.0, bound.of(mean)))
        return log_above(*ours, mean) + log_below(*theirs, other)

    return _least_reaches(evidence, (0.0, most), ends, needed)


def _worth(share: Share, factor: float) -> tuple[float, float]:
    return share.total / factor, share.count / factor


def _seeming(worth: tuple[float, float]) -> float:
    """Return the estimate; 0 of nothing, which speaks against no mean."""
    total, count = worth
    return total / count if count else 0.0


def _least_reaches(
    evidence: Callable[[float], float],
    domain: tuple[float, float],
    ends: tuple[float, float],
    needed: float,
) -> bool:
    """Return whether a convex function is at least ``needed`` all over its domain.

    Args:
        domain: Its least and its greatest argument.
        ends: Where the function is likely to be least in between, in any order.
    """
    low, high = domain
    if low > high:
        return True
    wanted = needed + SLACK
    for part in LIKELY:
        probe = ends[0] + part * (ends[1] - ends[0])
        if evidence(min(high, max(low, probe))) < wanted:
            return False
    at_low, at_high = evidence(low), evidence(high)
    if min(at_low, at_high) < wanted:
        return False
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = evidence(left), evidence(right)
    for _ in range(SHRINKS):
        if min(at_left, at_right) < wanted:
            return False
        if _floor((low, left, right, high), (at_low, at_left, at_right, at_high)) >= wanted:
            return True
        if at_left < at_right:
            high, at_high, right, at_right = right, at_right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = evidence(left)
        else:
            low, at_low, left, at_left = left, at_left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = evidence(right)
    return min(at_left, at_right) >= wanted


def _floor(
    at: tuple[float, float, float, float], value: tuple[float, float, float, float]
) -> float:
    """Return what a convex function cannot go below between the outer two of four points.

    Outside two points it lies above the line through them.
    """
    low, left, right, high = at
    if not low < left < right < high:
        return -math.inf
    inner = (value[2] - value[1]) / (right - left)
    outer = min(value[1] - inner * (left - low), value[2] + inner * (high - right))
    fall = min(0.0, (value[1] - value[0]) / (left - low))
    rise = max(0.0, (value[3] - value[2]) / (high - right))
    gap = right - left
    # between the middle two both outer lines hold; each alone is the least at its far end
    return min(outer, max(value[1] + fall * gap, value[2] - rise * gap))


class QuantileComparison:
    """One quantile of two arms against one bound.

    Args:
        quantile: In (0, 1).
        bound: Kept for good: where each bin's bound lies is looked up once.
    """

    def __init__(self, quantile: float, bound: Bound) -> None:
        self._coin = CoinEvidence(quantile)
        self._quantile = quantile
        self._fixed = not bound.ratio
        lower, upper = np.array(LOWER), np.array(UPPER)
        # If the baseline's quantile lies in bin i, the bound lies below (is at least) these edges.
        limit = np.full(NUM_BINS, bound.offset)
        with np.errstate(over="ignore"):  # beyond all bins
            tops = limit if self._fixed else bound.ratio * upper + bound.offset
            floors = limit if self._fixed else bound.ratio * lower + bound.offset
        self._over = np.searchsorted(lower, tops, side="left")
        self._under = np.maximum(0, np.searchsorted(lower, floors, side="right") - 1)
        if self._fixed:  # the limit itself may be a value: "up to it" reaches into its bin
            self._over = np.searchsorted(lower, tops, side="right")

    def above(
        self, baseline: Histogram, candidate: Histogram, needed: float, factors: Factors = ALONE
    ) -> bool:
        """Return whether the candidate's quantile is proven to lie above the bound."""
        theirs = candidate.below()
        if self._fixed:
            counts = theirs[self._over[:1]]
            return bool(self._coin.log_below(counts, candidate.count, factors[1])[0] >= needed)
        ours = baseline.below()[:-1]  # below the quantile lie at least so many
        theirs = theirs[self._over]  # up to the bound lie at most so many
        ends = self._end(ours, baseline), self._end(theirs, candidate)
        if ends[1] <= ends[0]:
            return False  # it does not even seem so

        def evidence(bins: Bins) -> Logs:
            known = self._coin.log_above(ours[bins], baseline.count, factors[0])
            return known + self._coin.log_below(theirs[bins], candidate.count, factors[1])

        return self._everywhere(evidence, ends, lambda: _steps(ours, theirs), needed)

    def below(
        self, baseline: Histogram, candidate: Histogram, needed: float, factors: Factors = ALONE
    ) -> bool:
        """Return whether the candidate's quantile is proven to lie below the bound."""
        theirs = candidate.below()
        if self._fixed:
            counts = theirs[self._under[:1]]
            return bool(self._coin.log_above(counts, candidate.count, factors[1])[0] >= needed)
        ours = baseline.below()[1:]  # up to the quantile lie at most so many
        theirs = theirs[self._under]  # below the bound lie at least so many
        ends = self._end(ours, baseline), self._end(theirs, candidate)
        if ends[0] <= ends[1]:
            return False

        def evidence(bins: Bins) -> Logs:
            known = self._coin.log_below(ours[bins], baseline.count, factors[0])
            return known + self._coin.log_above(theirs[bins], candidate.count, factors[1])

        return self._everywhere(evidence, ends, lambda: _steps(ours, theirs), needed)

    def _end(self, below: Counts, values: Histogram) -> int:
        """Return the first bin whose count is that of the quantile, or the last bin."""
        bin_ = int(below.searchsorted(self._quantile * values.count))
        return min(bin_, NUM_BINS - 1)

    def _everywhere(
        self,
        evidence: Callable[[Bins], Logs],
        ends: tuple[int, int],
        steps: Callable[[], Bins],
        needed: float,
    ) -> bool:
        """Return whether the evidence is at least ``needed`` in every bin.

        Args:
            evidence: Of bins, in which the baseline's quantile may lie.
            ends: Where it seems to lie, and where the candidate's would have it.
            steps: One bin of each run in which neither arm has a value.
            needed: The log of 1/level.
        """
        near, far = ends
        probes = [near + (far - near) * i // (PROBES - 1) for i in range(PROBES)]
        if evidence(np.array(probes)).min() < needed:
            return False
        return bool(evidence(steps()).min() >= needed)


def _steps(ours: Counts, theirs: Counts) -> Bins:
    """Return the first bin of each run of equal counts: all of a run have the same evidence."""
    changes = np.flatnonzero((ours[1:] != ours[:-1]) | (theirs[1:] != theirs[:-1]))
    return np.concatenate(([0], changes + 1))
