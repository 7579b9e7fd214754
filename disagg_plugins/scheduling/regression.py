"""A straight-line model of a time, fitted to one observation after another (no clock, no I/O).

Weighted least squares with forgetting, kept as normal equations of a few features, and solved with
every coefficient at least 0: a negative cost per token is noise, and would make a longer prompt
look cheaper. Memory and work are bounded by the number of features, not of observations.
"""

from __future__ import annotations

import math
from operator import mul, truediv
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FORGETTING = 0.995
"""Weight kept by older observations at each new one: about the last 200 count. A worker changes
with its traffic and its neighbours, within minutes rather than seconds."""

SOLVE_EVERY = 32
"""New observations until coefficients are computed anew: the costliest part of learning, and far
fewer than ``FORGETTING`` remembers. The first ones count at once."""

SOLVED_SINGLY = 32
"""The first observations, after each of which the coefficients are computed."""

WARM = 8
"""Observations until residuals are weighed against the prediction alone."""

STIFFNESS = 1e-4
"""Pull towards the last coefficients, as a share of what the data say: it decides only where the
data do not, such as between a base and a slope when all prompts have one length."""

OUTLIER = 3.0
"""Relative residuals beyond so many times the usual one count as if they lay there (Huber's loss).
A paused process or a first compilation is no property of the worker."""

LEAST_S = 1e-6
"""Below this times are not told apart."""

LEAST_PART_S = 1e-12
"""A part of a time that no clock tells: as good as none."""

USUAL_ERROR = 0.1
"""Relative residual that is taken for usual before there are observations."""

SEED_ERROR = 0.3
"""Standard error of a seed's coefficients, relative: the same model on the same hardware, measured
another day, differs less than the guesses of a fresh start."""

SWEEPS = 8
"""Of coordinate descent after the direct solution; most solutions need none."""

SMOOTHING = 0.05
"""Share of one observation in the running mean of the errors: about the last 20 count."""


class Regression:
    """Times as a sum of coefficients times features.

    Args:
        scales: A typical size of each feature: the equations are solved in these units.
        shares: How the first observation is shared out among the features, in sum 1; used only
            where there is no seed.
        forgetting: 1.0 forgets nothing: for a fit over a file.
    """

    def __init__(
        self, scales: Sequence[float], shares: Sequence[float], *, forgetting: float = FORGETTING
    ) -> None:
        size = len(scales)
        self._scales = tuple(scales)
        self._shares = tuple(shares)
        self._forgetting = forgetting
        self._pairs = [(i, j) for i in range(size) for j in range(i + 1)]
        self._matrix = [0.0] * len(self._pairs)  # its lower half, in the order of the pairs
        self._vector = [0.0] * size
        self._solution = [0.0] * size
        self.coefficients = (0.0,) * size  # seconds for one unit of each feature; never negative
        self._unsolved = 0
        self._usual = USUAL_ERROR
        self.seeded = False
        self.observations = 0
        self.error = 0.0

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self.seeded or self.observations > 0

    def seed(self, coefficients: Sequence[float]) -> None:
        """Start from known coefficients; observations soon outweigh them."""
        self.seeded = True
        self._solution = [max(0.0, c) * s for c, s in zip(coefficients, self._scales, strict=True)]
        for i, value in enumerate(self._solution):
            if value > LEAST_PART_S:
                # one observation has a relative error of about USUAL_ERROR, so weighs 1 against it
                known = (USUAL_ERROR / (SEED_ERROR * value)) ** 2
                self._matrix[self._pairs.index((i, i))] += known
                self._vector[i] += known * value
        self._publish()

    def predict(self, features: Sequence[float]) -> float:
        """Return the time of these features, in seconds; finite, never negative."""
        total: float = sum(map(mul, features, self.coefficients))
        return total

    def _publish(self) -> None:
        self.coefficients = tuple(map(truediv, self._solution, self._scales))

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """Take one observation; what is not finite or negative is left out."""
        if not (0.0 <= seconds < math.inf and 0.0 <= min(features) and sum(features) < math.inf):
            return
        scaled = list(map(truediv, features, self._scales))
        if not self.known:
            self._share_out(scaled, seconds)
        predicted = sum(map(mul, scaled, self._solution))
        # Relative errors: a prompt of 10,000 tokens must not drown a hundred short ones.
        unit = max(predicted, LEAST_S)
        if self.observations < WARM:
            unit = max(unit, seconds)
        residual = abs(seconds - predicted) / unit
        bound = OUTLIER * self._usual
        weight = (1.0 if residual <= bound else bound / residual) / (unit * unit)
        if self.observations:
            self._usual += SMOOTHING * (min(residual, bound) - self._usual)
            self._usual = max(self._usual, USUAL_ERROR / 10)
            error = abs(seconds - predicted) / max(seconds, LEAST_S)
            self.error += max(SMOOTHING, 1.0 / self.observations) * (error - self.error)
        self._add(scaled, seconds, weight)
        self.observations += 1
        self._unsolved += 1
        if self._unsolved >= SOLVE_EVERY or self.observations <= SOLVED_SINGLY:
            self.solve()

    def _share_out(self, scaled: Sequence[float], seconds: float) -> None:
        present = [s if x > 0.0 else 0.0 for s, x in zip(self._shares, scaled, strict=True)]
        total = sum(present)
        if total > 0.0:
            self._solution = [
                share / total * seconds / x if x > 0.0 else 0.0
                for share, x in zip(present, scaled, strict=True)
            ]
            self._publish()

    def _add(self, scaled: Sequence[float], seconds: float, weight: float) -> None:
        keep = self._forgetting
        weighted = [weight * value for value in scaled]
        self._matrix = [
            keep * old + weighted[i] * scaled[j]
            for old, (i, j) in zip(self._matrix, self._pairs, strict=True)
        ]
        self._vector = [
            keep * old + value * seconds for old, value in zip(self._vector, weighted, strict=True)
        ]

    def solve(self) -> None:
        """Bring the coefficients up to date with the observations."""
        self._unsolved = 0
        size = len(self._vector)
        matrix = [[0.0] * size for _ in range(size)]
        for (i, j), value in zip(self._pairs, self._matrix, strict=True):
            matrix[i][j] = matrix[j][i] = value
        vector = list(self._vector)
        for i in range(size):
            pull = STIFFNESS * matrix[i][i]
            matrix[i][i] += pull
            vector[i] += pull * self._solution[i]
        self._solution = solve_non_negative(matrix, vector, self._solution)
        self._publish()


def solve_non_negative(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], last: Sequence[float]
) -> list[float]:
    """Return x >= 0 with about the least error of ``matrix @ x = vector``.

    Solves without the bound and sets the most negative coefficient to 0, until none is; then a few
    sweeps of projected coordinate descent take back what was dropped too early. Every sweep lowers
    the error and keeps to the bound (Lawson and Hanson, "Solving Least Squares Problems", chapter
    23, has the exact method; with five features the difference is far below the noise).

    Args:
        matrix: Symmetric, no negative eigenvalue.
        vector: The right side.
        last: Kept for features that no observation has had yet.
    """
    seen = [i for i in range(len(vector)) if matrix[i][i] > 0.0]
    active = list(seen)
    result = list(last)
    while active:
        values = _solve(
            [[matrix[i][j] for j in active] for i in active], [vector[i] for i in active]
        )
        if values is None:
            break
        worst = min(range(len(active)), key=values.__getitem__)
        if values[worst] < 0.0:
            result[active.pop(worst)] = 0.0
            continue
        for i, value in zip(active, values, strict=True):
            result[i] = value
        break
    for _ in range(SWEEPS):
        for i in seen:
            row = matrix[i]
            rest = vector[i] - sum(row[j] * result[j] for j in seen if j != i)
            result[i] = max(0.0, rest / row[i])
    return result


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """Return x of ``matrix @ x = vector`` by Gauss's elimination, or None where none is finite."""
    size = len(vector)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(matrix[i][k]))
        if abs(matrix[pivot][k]) < 1e-300:
            return None
        matrix[k], matrix[pivot] = matrix[pivot], matrix[k]
        vector[k], vector[pivot] = vector[pivot], vector[k]
        for i in range(k + 1, size):
            factor = matrix[i][k] / matrix[k][k]
            if factor:
                for j in range(k, size):
                    matrix[i][j] -= factor * matrix[k][j]
                vector[i] -= factor * vector[k]
    values = [0.0] * size
    for k in reversed(range(size)):
        rest = vector[k] - sum(matrix[k][j] * values[j] for j in range(k + 1, size))
        values[k] = rest / matrix[k][k]
    return values if all(map(math.isfinite, values)) else None
