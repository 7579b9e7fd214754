"""Intervals that hold at every moment at once, so one may look as often as one likes (pure).

A usual confidence interval holds at one sample size fixed beforehand; who looks again and again
and stops when he likes what he sees is wrong far more often than it says. A confidence sequence
covers the true value at all sample sizes together, with a chance of at least 1 - ``level``; each
side misses with at most half of that. What is paid for it is width (see ``make bench
NAME=sequential``).

What is assumed: each value has the same mean, or quantile, given those before it. Requests that
queue behind each other are not independent: ``dependence`` measures how much they share, and the
evidence is divided by that. Load changes over a day, so both arms must get their requests at
random and at the same time, and no verdict is better than that.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np

from disagg_plugins.canary.evidence import log_above, log_below
from disagg_plugins.canary.histogram import LOWER, NUM_BINS, UPPER, Histogram
from disagg_plugins.canary.state import integer, known, number

STEPS = 60
"""Of the search for a bound, at most; eighteen are usual."""

EXACT = 1e-12
"""So near to each other the two sides of a bound in [0, 1] are one."""


class Share:
    """Count and total of values in [0, 1]: the evidence of a proportion or of a bounded mean."""

    __slots__ = ("count", "total")

    def __init__(self, count: int = 0, total: float = 0.0) -> None:
        self.count = count
        self.total = total

    def observe(self, value: float) -> None:
        """Count one value.

        Raises:
            ValueError: It lies outside [0, 1].
        """
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{value!r} does not lie between 0 and 1")
        self.count += 1
        self.total += value

    def merge(self, other: Share) -> None:
        """Add what another gateway, or another time, counted."""
        self.count += other.count
        self.total += other.total

    def estimate(self) -> float | None:
        """Return the mean so far, or None of nothing."""
        return self.total / self.count if self.count else None

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values."""
        return {"count": self.count, "total": self.total}

    @staticmethod
    def from_dict(state: object) -> Share:
        """Return the share of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, ("count", "total"), "a share")
        count = integer(plain["count"], 0, None, "the count of a share")
        # a sum of many floats may exceed their number by rounding, by far less than this
        most = count * (1.0 + 1e-9)
        return Share(count, min(number(plain["total"], 0.0, most, "the total of a share"), count))


def share_interval(share: Share, level: float, factor: float = 1.0) -> tuple[float, float]:
    """Return bounds of the mean, of which each is wrong at any time with at most ``level / 2``.

    ``factor`` values are worth one independent one (see ``dependence``).

    For coins this is the beta-binomial sequence of Howard et al. 2021 (see ``evidence``). Values
    strictly between 0 and 1 are covered as well, though less tightly than by the betting of
    Waudby-Smith and Ramdas 2024, whose state depends on the order and cannot be merged.
    """
    if not share.count:
        return 0.0, 1.0
    needed = math.log(2.0 / level)
    total, count = share.total / factor, share.count / factor
    mean = min(1.0, total / count)
    low, high = 0.0, 1.0
    if log_above(total, count, low) >= needed:  # always: the mean is proven to lie above ``low``
        low = _last_proven(lambda m: log_above(total, count, m) - needed, low, mean)
    if log_below(total, count, high) >= needed:
        high = _last_proven(lambda m: log_below(total, count, m) - needed, high, mean)
    return low, high


def _last_proven(excess: Callable[[float], float], proven: float, open_side: float) -> float:
    """Return the last point towards ``open_side`` at which a function is not yet negative.

    By the Illinois method (Dowell and Jarratt 1971): as sure as bisection, a third of its steps.
    """
    at_proven, at_open = excess(proven), excess(open_side)
    if at_open >= 0.0:
        return open_side
    moved = ""
    for _ in range(STEPS):
        if abs(open_side - proven) <= EXACT:
            break
        middle = (proven * at_open - open_side * at_proven) / (at_open - at_proven)
        at_middle = excess(middle)
        if at_middle >= 0.0:
            proven, at_proven = middle, at_middle
            at_open = at_open / 2.0 if moved == "proven" else at_open
            moved = "proven"
        else:
            open_side, at_open = middle, at_middle
            at_proven = at_proven / 2.0 if moved == "open" else at_proven
            moved = "open"
    return proven


def quantile_interval(
    values: Histogram, quantile: float, level: float, factor: float = 1.0
) -> tuple[float, float]:
    """Return bounds of a quantile; each is wrong at any time with at most ``level / 2``.

    ``factor`` values are worth one independent one (see ``dependence``).

    Howard and Ramdas, "Sequential estimation of quantiles with applications to A/B testing and
    best-arm identification", Bernoulli 28(3), 2022: whether a value lies below the true quantile
    is a coin of known mean, so only edges whose count a fair coin could show remain. Edges are
    counted exactly and the next one outside is taken, so a bound is up to a bin (1 %) too wide and
    never too narrow. 0 and +inf stand for "not bounded yet"; +inf is also what more than
    1 - quantile of failures are.
    """
    if not values.count:
        return 0.0, math.inf
    needed = math.log(2.0 / level)
    below, count = values.below(), values.count / factor
    # Bin i may hold the quantile while neither "all below it" nor "all up to it" contradicts,
    # and of both the first grows with i and the second falls.
    first = bisect_left(
        range(NUM_BINS - 1),
        True,
        key=lambda i: log_below(int(below[i + 1]) / factor, count, quantile) < needed,
    )
    last = bisect_right(
        range(1, NUM_BINS),
        False,
        key=lambda i: log_above(int(below[i]) / factor, count, quantile) >= needed,
    )
    return LOWER[first], UPPER[last]


def quantile_estimate(values: Histogram, quantile: float) -> float | None:
    """Return the quantile of what was counted, as the middle of its bin; None of nothing."""
    if not values.count:
        return None
    bin_ = int(np.searchsorted(np.cumsum(values.counts), quantile * values.count, side="left"))
    low, high = LOWER[bin_], UPPER[bin_]
    return high if math.isinf(high) else (low + high) / 2


class MeanSequence:
    """The confidence sequence of one mean of values in [0, 1]; of a proportion: 0 or 1.

    Args:
        level: The chance that it ever misses the true mean.
        share: What was counted already; shared with whoever else counts there.
    """

    def __init__(self, level: float, share: Share | None = None) -> None:
        self.level = _checked_level(level)
        self.share = Share() if share is None else share

    @property
    def count(self) -> int:
        """How many values were observed."""
        return self.share.count

    def observe(self, value: float) -> None:
        """See ``Share.observe``."""
        self.share.observe(value)

    def interval(self) -> tuple[float, float]:
        """See ``share_interval``."""
        return share_interval(self.share, self.level)

    def merge(self, other: MeanSequence) -> None:
        """Add the counts of another sequence: evidence of both is as if one had seen all."""
        self.share.merge(other.share)

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values."""
        return {"level": self.level, "share": self.share.as_dict()}

    @staticmethod
    def from_dict(state: object) -> MeanSequence:
        """Return the sequence of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, ("level", "share"), "a sequence of means")
        level = number(plain["level"], 1e-12, 1 - 1e-12, "the level")
        return MeanSequence(level, Share.from_dict(plain["share"]))


class QuantileSequence:
    """The confidence sequence of one quantile of values from 0 to +inf.

    Args:
        quantile: In (0, 1): 0.99 is the p99.
        level: The chance that it ever misses the true quantile.
        values: What was counted already; shared with whoever else counts there.
    """

    def __init__(self, quantile: float, level: float, values: Histogram | None = None) -> None:
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, not at {quantile!r}")
        self.quantile = quantile
        self.level = _checked_level(level)
        self.values = Histogram() if values is None else values

    @property
    def count(self) -> int:
        """How many values were observed."""
        return self.values.count

    def observe(self, value: float) -> None:
        """See ``Histogram.observe``."""
        self.values.observe(value)

    def interval(self) -> tuple[float, float]:
        """See ``quantile_interval``."""
        return quantile_interval(self.values, self.quantile, self.level)

    def merge(self, other: QuantileSequence) -> None:
        """Add the counts of another sequence: evidence of both is as if one had seen all."""
        self.values.merge(other.values)

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values."""
        return {"quantile": self.quantile, "level": self.level, "values": self.values.as_dict()}

    @staticmethod
    def from_dict(state: object) -> QuantileSequence:
        """Return the sequence of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, ("quantile", "level", "values"), "a sequence of quantiles")
        quantile = number(plain["quantile"], 1e-12, 1 - 1e-12, "the quantile")
        level = number(plain["level"], 1e-12, 1 - 1e-12, "the level")
        return QuantileSequence(quantile, level, Histogram.from_dict(plain["values"]))


def _checked_level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"a level lies between 0 and 1, not at {level!r}")
    return level
