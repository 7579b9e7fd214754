"""Counts of values in fixed bins on a logarithmic scale (pure).

The edges are the same for everybody, so histograms of several gateways, or of one before and after
a restart, are added bin by bin and nothing is lost: only counts matter to a quantile.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.state import integers, known
from disagg_plugins.errors import DamagedState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from disagg_plugins.canary.evidence import Counts, Logs

DECADES = (-4, 4)
"""From 0.1 ms, below which no answer comes over a network, to 10,000 s, beyond every time-out."""

BINS_PER_DECADE = 232
"""10^(1/232) is 1.00997: a bin is 1 % wide, less than anybody cares about in a latency."""

# Rounded, so that two machines whose libm differs in the last bit have the same edges.
EDGES: tuple[float, ...] = tuple(
    float(f"{10.0 ** (DECADES[0] + i / BINS_PER_DECADE):.8g}")
    for i in range((DECADES[1] - DECADES[0]) * BINS_PER_DECADE + 1)
)
"""Bin ``i`` holds the values from edge ``i - 1``, itself included, to below edge ``i``; the first
begins at 0, the last has no end and holds +inf."""

_EDGES = np.array(EDGES)

NUM_BINS = len(EDGES) + 1

LOWER: tuple[float, ...] = (0.0, *EDGES)
"""The least value of each bin."""

UPPER: tuple[float, ...] = (*EDGES, math.inf)
"""The bound of each bin; only +inf itself is reached."""


class Histogram:
    """Counts of values from 0 to +inf; ``counts`` has one number a bin."""

    __slots__ = ("_below", "_below_count", "count", "counts")

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(NUM_BINS, dtype=np.int64)
        self.count = 0
        self._below: Counts = np.zeros(NUM_BINS + 1, dtype=np.int64)
        self._below_count = 0

    @staticmethod
    def of(values: Sequence[float] | Logs) -> Histogram:
        """Return the histogram of many values; see ``observe``."""
        result = Histogram()
        array = np.asarray(values, dtype=np.float64)
        if array.size and not bool((array >= 0.0).all()):
            raise ValueError("a value is not a number of at least 0")
        bins = np.searchsorted(_EDGES, array, side="right")
        result.counts += np.bincount(bins, minlength=NUM_BINS)
        result.count = int(array.size)
        return result

    def observe(self, value: float) -> None:
        """Count one value.

        Raises:
            ValueError: It is negative or not a number.
        """
        if not value >= 0.0:
            raise ValueError(f"{value!r} is not a number of at least 0")
        self.counts[bisect_right(EDGES, value)] += 1
        self.count += 1

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts
        self.count += other.count

    def below(self) -> Counts:
        """Return, shape (NUM_BINS + 1,), how many values lie below bin ``i``; the last: all.

        Not to be changed; every guardrail of a metric asks for it at every look.
        """
        if self._below_count != self.count:  # counts only grow
            self._below = np.concatenate(([0], np.cumsum(self.counts)))
            self._below_count = self.count
        return self._below

    def as_dict(self) -> dict[str, object]:
        """Return the counts as plain values: the bins that are not empty."""
        filled = np.flatnonzero(self.counts)
        return {"bins": filled.tolist(), "counts": self.counts[filled].tolist()}

    @staticmethod
    def from_dict(state: object) -> Histogram:
        """Return the histogram of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain: Mapping[str, object] = known(state, ("bins", "counts"), "a histogram")
        bins = integers(plain["bins"], 0, NUM_BINS - 1, "a bin")
        counts = integers(plain["counts"], 1, None, "a count")
        if len(bins) != len(counts) or any(a >= b for a, b in zip(bins, bins[1:], strict=False)):
            raise DamagedState(f"{len(bins)} bins and {len(counts)} counts do not fit together")
        result = Histogram()
        result.counts[bins] = counts
        result.count = sum(counts)
        return result
