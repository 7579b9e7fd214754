"""How many requests in a row share one fate (pure).

Requests that queue behind each other are fast or slow together. Ten such requests are worth less
than ten independent ones, and evidence that counts them as ten condemns the arm that happened to
be busy: with an autocorrelation of 0.9 between neighbours, most canaries of identical arms.

The remedy: where requests ``factor`` apart are independent, both the count and the total of the
evidence are divided by ``factor``. This is the geometric mean of the evidence of ``factor``
interleaved series, each of independent requests, and by Hölder's inequality no such mean exceeds 1
on average where none of its parts does.

The factor is measured: a batch of b independent values varies b times as much as one value, and a
batch of dependent ones more (batch means; Flegal and Jones, "Batch means and spectral variance
estimators in Markov chain Monte Carlo", Annals of Statistics 38(2), 2010). Batches double in length
from level to level, so memory is fixed and each value costs two additions. A measured factor is no
proven one: what depends over more requests than were seen so far is found only later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.state import integer, known, number
from disagg_plugins.errors import DamagedState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.canary.evidence import Logs

LEVELS = 14
"""Batches of 1 to 8,192 requests: minutes of dependence in a busy arm."""

LEAST_BATCHES = 16
"""Fewer say too little of how much a batch varies: the standard error is sqrt(2 / batches) of it. A
level counts where it shows more than that: else the worst of many levels would always be a high
one, and independent requests would pay for it."""

FEW = 48
"""Fewer values are taken faster one by one than as an array."""

WORST = float(2 ** (LEVELS - 1))
"""No factor is greater: all of a batch are as one."""


class Dependence:
    """The variation of batches of each length, of a series of values in [0, 1].

    ``batches``, ``totals`` and ``squares`` have one number a level; ``pending`` is the first half
    of a batch of the next level, or None. Other series that were merged are kept as their number of
    values and that times their factors: their means differ, and in one sum that would look like
    dependence.
    """

    __slots__ = (
        "_factor",
        "_factor_at",
        "batches",
        "merged",
        "merged_worth",
        "pending",
        "squares",
        "totals",
    )

    def __init__(self) -> None:
        self.batches = [0] * LEVELS
        self.totals = [0.0] * LEVELS
        self.squares = [0.0] * LEVELS
        self.pending: list[float | None] = [None] * LEVELS
        self.merged = 0
        self.merged_worth = 0.0
        self._factor = 1.0
        self._factor_at = 0

    def observe(self, value: float) -> None:
        """Take the next value of the series."""
        for level in range(LEVELS):
            self.batches[level] += 1
            self.totals[level] += value
            self.squares[level] += value * value
            half = self.pending[level]
            if half is None:
                self.pending[level] = value
                return
            self.pending[level] = None
            value += half

    def extend(self, values: Logs) -> None:
        """Take the next values of the series; as ``observe`` of each, but fast."""
        if len(values) < FEW:
            for value in values.tolist():
                self.observe(value)
            return
        for level in range(LEVELS):
            if not len(values):
                return
            self.batches[level] += len(values)
            self.totals[level] += float(np.add.reduce(values))
            self.squares[level] += float(values.dot(values))
            half = self.pending[level]
            if half is not None:
                values = np.concatenate(([half], values))
            self.pending[level] = float(values[-1]) if len(values) % 2 else None
            whole = len(values) // 2 * 2
            values = values[0:whole:2] + values[1:whole:2]

    def merge(self, other: Dependence) -> None:
        """Let the factor be the mean of this series' and another's, by their numbers of values."""
        self.merged += other.count
        self.merged_worth += other.count * other.factor()

    @property
    def count(self) -> int:
        """How many values were observed, merged ones included."""
        return self.batches[0] + self.merged

    def factor(self) -> float:
        """Return about how many requests are worth one independent one; at least 1."""
        if self._factor_at != self.count:
            own = self._own()
            if self.merged:
                own = (self.batches[0] * own + self.merged_worth) / self.count
            self._factor, self._factor_at = own, self.count
        return self._factor

    def _own(self) -> float:
        single = self._variance(0)
        if single <= 0.0:
            return 1.0
        found = shorter = 1.0
        for level in range(1, LEVELS):
            batches = self.batches[level]
            if batches < LEAST_BATCHES:
                break
            ratio = self._variance(level) / (single * 2**level)
            if ratio * (1.0 - math.sqrt(2.0 / batches)) > 1.0:
                # what is still missing at this length halves from one to the next
                found = max(found, ratio, 2.0 * ratio - shorter)
            shorter = ratio
        return min(found, WORST)

    def _variance(self, level: int) -> float:
        count = self.batches[level]
        if count < 2:
            return 0.0
        mean = self.totals[level] / count
        return max(0.0, self.squares[level] / count - mean * mean) * count / (count - 1)

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values; batches under way are begun anew by who reads it."""
        return {
            "batches": self.batches[:],
            "totals": self.totals[:],
            "squares": self.squares[:],
            "merged": self.merged,
            "merged_worth": self.merged_worth,
        }

    @staticmethod
    def from_dict(state: object) -> Dependence:
        """Return the dependence of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        what = "a series"
        names = ("batches", "totals", "squares")
        plain: Mapping[str, object] = known(state, (*names, "merged", "merged_worth"), what)
        columns = [plain[key] for key in names]
        for column in columns:
            if not isinstance(column, list) or len(column) != LEVELS:
                raise DamagedState(f"{what} has not {LEVELS} levels")
        result = Dependence()
        for level, (batches, total, square) in enumerate(zip(*columns, strict=True)):
            result.batches[level] = integer(batches, 0, None, "the batches of a series")
            # a batch sums values of at most 1 each; the rest is rounding
            most = result.batches[level] * 2.0**level * (1 + 1e-9)
            result.totals[level] = number(total, 0.0, most, "the total of a series")
            most *= 2.0**level
            result.squares[level] = number(square, 0.0, most, "the squares of a series")
        result.merged = integer(plain["merged"], 0, None, "the values merged into a series")
        least, most = float(result.merged), result.merged * WORST
        result.merged_worth = number(plain["merged_worth"], least, most, "their worth")
        return result
