"""How strongly a count speaks against a supposed mean, valid however often one looks (pure).

For values in [0, 1] whose mean, given all that came before, is ``m``, and any tilt ``t``,

    exp(t * total - count * log(1 + m * (exp(t) - 1)))

is a supermartingale that begins at 1: exp is convex, so a value in between gains no more than a
coin of the same mean (Hoeffding 1963). By Ville's inequality it ever reaches 1/level with a chance
of at most ``level``. A bet with ``t`` > 0 grows where the true mean lies above ``m``, one with
``t`` < 0 where it lies below.

The best tilt depends on the true mean, which nobody knows, so the stake is spread over a fixed
row of tilts: the discrete mixture of Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49(2), 2021. It is the
one-sided beta-binomial mixture of that paper with a sum in place of the incomplete beta integral:
as tight, cheaper, and monotone in both total and mean, which the callers need.

Only count and total enter. So the order is nothing to it, memory is two numbers, and the evidence
of two independent streams multiplies.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Logs = npt.NDArray[np.float64]

STRONGEST = 8.0
"""The largest tilt, for a rare event that became the rule; odds change by a factor of exp(8)."""

TILTS = tuple(STRONGEST * 2.0 ** (-i / 2) for i in range(24))
"""Neighbours differ by sqrt(2), which leaves at most 3 % of the growth unused. The weakest, 0.0028,
is the best for a median after some two million requests."""

USUAL = (0.02, 2.1)
"""Tilts that are best for a median, a p99 or a share of errors of 1 % between about 100 and 100,000
requests, where a canary is decided: sqrt(2 * log(1/level) / (requests * m * (1 - m)))."""

USUAL_SHARE = 0.9
"""The stake on the usual tilts; the others share the rest."""


def _log_stakes() -> tuple[float, ...]:
    usual = [USUAL[0] <= t <= USUAL[1] for t in TILTS]
    number = sum(usual)
    each, other = USUAL_SHARE / number, (1.0 - USUAL_SHARE) / (len(TILTS) - number)
    return tuple(math.log(each if u else other) for u in usual)


LOG_STAKES = _log_stakes()
_ABOVE = tuple((stake, t, math.expm1(t)) for stake, t in zip(LOG_STAKES, TILTS, strict=True))
_BELOW = tuple((stake, -t, math.expm1(-t)) for stake, t in zip(LOG_STAKES, TILTS, strict=True))


def log_above(total: float, count: float, mean: float) -> float:
    """Return the log evidence that the true mean lies above ``mean``, for 0 <= mean <= 1.

    Grows with ``total``; falls, as a convex function, with ``mean``.
    """
    return _log_sum(total, count, mean, _ABOVE)


def log_below(total: float, count: float, mean: float) -> float:
    """Return the log evidence that the true mean lies below ``mean``, for 0 <= mean <= 1.

    Falls with ``total``; grows, as a convex function, with ``mean``.
    """
    return _log_sum(total, count, mean, _BELOW)


def _log_sum(
    total: float, count: float, mean: float, bets: tuple[tuple[float, float, float], ...]
) -> float:
    log1p = math.log1p
    logs = [stake + t * total - count * log1p(mean * growth) for stake, t, growth in bets]
    top = max(logs)
    return top + math.log(sum([math.exp(value - top) for value in logs]))


class CoinEvidence:
    """The same for many counts at once against one supposed mean that stays.

    Args:
        mean: In (0, 1).
    """

    def __init__(self, mean: float) -> None:
        tilts = np.array(TILTS)
        self._stakes = np.array(LOG_STAKES)
        self._up = (tilts, np.log1p(mean * np.expm1(tilts)))
        self._down = (-tilts, np.log1p(mean * np.expm1(-tilts)))

    def log_above(self, totals: Counts, count: int, factor: float = 1.0) -> Logs:
        """Return ``log_above`` of each total, total and count divided by ``factor``."""
        return self._logs(totals, count, factor, self._up)

    def log_below(self, totals: Counts, count: int, factor: float = 1.0) -> Logs:
        """Return ``log_below`` of each total, total and count divided by ``factor``."""
        return self._logs(totals, count, factor, self._down)

    def _logs(self, totals: Counts, count: int, factor: float, bets: tuple[Logs, Logs]) -> Logs:
        tilts, costs = bets
        logs = np.multiply.outer(totals, tilts / factor) + (self._stakes - count / factor * costs)
        top = logs.max(axis=1)
        result: Logs = top + np.log(np.exp(logs - top[:, None]).sum(axis=1))
        return result
