"""What was counted of one metric of one arm: the values, and how much they depend (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.confidence import (
    Share,
    quantile_estimate,
    quantile_interval,
    share_interval,
)
from disagg_plugins.canary.dependence import Dependence
from disagg_plugins.canary.guardrail import Figure
from disagg_plugins.canary.histogram import Histogram
from disagg_plugins.canary.state import known, number
from disagg_plugins.errors import DamagedState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from disagg_plugins.canary.evidence import Logs

MEDIAN = 0.5
"""Watched in any case: it is soonest known, and shows best that requests wait for each other."""

LEAST_BEYOND = 20
"""Values to be expected on either side of a quantile before its place is taken as known: enough
that those on the rarer side vary by a quarter, which is nothing to a measure of dependence."""


class ShareTally:
    """Values in [0, 1] of one arm, in their order."""

    __slots__ = ("dependence", "share")

    def __init__(self) -> None:
        self.share = Share()
        self.dependence = Dependence()

    @property
    def count(self) -> int:
        """How many values were observed."""
        return self.share.count

    def observe(self, value: float) -> None:
        """See ``Share.observe``."""
        self.share.observe(value)
        self.dependence.observe(value)

    def extend(self, values: Logs) -> None:
        """Count many values in their order.

        Raises:
            ValueError: One lies outside [0, 1]; none is counted then.
        """
        if not bool(((values >= 0.0) & (values <= 1.0)).all()):
            raise ValueError("a value does not lie between 0 and 1")
        self.share.merge(Share(len(values), float(values.sum())))
        self.dependence.extend(values)

    def merge(self, other: ShareTally) -> None:
        """Add what another gateway counted."""
        self.share.merge(other.share)
        self.dependence.merge(other.dependence)

    @property
    def measured(self) -> int:
        """How many values the factor was measured on."""
        return self.dependence.count

    def factor(self) -> float:
        """See ``Dependence.factor``."""
        return self.dependence.factor()

    def figure(self, level: float) -> Figure:
        """Return what is known, with the interval at ``level``."""
        factor = self.factor()
        interval = share_interval(self.share, level, factor)
        return Figure(self.count, self.share.estimate(), *interval, factor, self.measured)

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values."""
        return {"share": self.share.as_dict(), "dependence": self.dependence.as_dict()}

    @staticmethod
    def from_dict(state: object) -> ShareTally:
        """Return the tally of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, ("share", "dependence"), "a tally")
        result = ShareTally()
        result.share = Share.from_dict(plain["share"])
        result.dependence = Dependence.from_dict(plain["dependence"])
        return result


class _Watched:
    """Whether values lie below a place near a quantile: the series whose dependence is measured."""

    __slots__ = ("dependence", "place", "quantile")

    def __init__(self, quantile: float) -> None:
        self.quantile = quantile
        self.place: float | None = None
        self.dependence = Dependence()

    def look_for_place(self, values: Histogram) -> None:
        """Fix the place once enough values are known; it stays, for else the series would jump."""
        if min(self.quantile, 1.0 - self.quantile) * values.count >= LEAST_BEYOND:
            self.place = quantile_estimate(values, self.quantile)


class AmountTally:
    """Values from 0 to +inf of one arm, in their order.

    Args:
        quantiles: Those that guardrails ask for; the median is watched besides.
    """

    __slots__ = ("_watched", "values")

    def __init__(self, quantiles: Collection[float]) -> None:
        self.values = Histogram()
        self._watched = [_Watched(q) for q in sorted({MEDIAN, *quantiles})]

    @property
    def count(self) -> int:
        """How many values were observed."""
        return self.values.count

    def observe(self, value: float) -> None:
        """See ``Histogram.observe``."""
        self.values.observe(value)
        for watched in self._watched:
            if watched.place is None:
                watched.look_for_place(self.values)
            else:
                watched.dependence.observe(float(value < watched.place))

    def extend(self, values: Logs) -> None:
        """Count many values in their order.

        Raises:
            ValueError: One is negative or not a number; none is counted then.
        """
        if not bool((values >= 0.0).all()):
            raise ValueError("a value is not a number of at least 0")
        while len(values):
            # while a place is looked for no more than doubles the count, so most of it is watched
            whole = all(w.place is not None for w in self._watched)
            piece = len(values) if whole else max(LEAST_BEYOND, self.count)
            self._extend(values[:piece])
            values = values[piece:]

    def _extend(self, values: Logs) -> None:
        self.values.merge(Histogram.of(values))
        for watched in self._watched:
            if watched.place is None:
                watched.look_for_place(self.values)
            else:
                watched.dependence.extend((values < watched.place).astype(np.float64))

    def merge(self, other: AmountTally) -> None:
        """Add what another gateway counted, of the same quantiles."""
        self.values.merge(other.values)
        for ours, theirs in zip(self._watched, other._watched, strict=True):
            ours.dependence.merge(theirs.dependence)

    @property
    def measured(self) -> int:
        """How many values the factor was measured on."""
        return max(w.dependence.count for w in self._watched if w.quantile == MEDIAN)

    def factor(self, quantile: float) -> float:
        """Return the factor for a quantile: that of the median, until its own is the greater."""
        return max(w.dependence.factor() for w in self._watched if w.quantile in (MEDIAN, quantile))

    def figure(self, quantile: float, level: float) -> Figure:
        """Return what is known of a quantile, with the interval at ``level``."""
        factor = self.factor(quantile)
        interval = quantile_interval(self.values, quantile, level, factor)
        return Figure(
            self.count, quantile_estimate(self.values, quantile), *interval, factor, self.measured
        )

    def as_dict(self) -> dict[str, object]:
        """Return the state as plain values; a place at +inf is told as such, as JSON has none."""
        watched = [
            {
                "quantile": w.quantile,
                "place": "inf" if w.place == float("inf") else w.place,
                "dependence": w.dependence.as_dict(),
            }
            for w in self._watched
        ]
        return {"values": self.values.as_dict(), "watched": watched}

    @staticmethod
    def from_dict(state: object, quantiles: Collection[float]) -> AmountTally:
        """Return the tally of ``as_dict``, for the same quantiles.

        Raises:
            DamagedState: It is anything else.
        """
        plain: Mapping[str, object] = known(state, ("values", "watched"), "a tally")
        result = AmountTally(quantiles)
        result.values = Histogram.from_dict(plain["values"])
        stored = plain["watched"]
        if not isinstance(stored, list) or len(stored) != len(result._watched):
            raise DamagedState(f"{len(result._watched)} watched quantiles are expected")
        for watched, item in zip(result._watched, stored, strict=True):
            each = known(item, ("quantile", "place", "dependence"), "a watched quantile")
            if each["quantile"] != watched.quantile:
                raise DamagedState(f"the quantile is {each['quantile']!r}, not {watched.quantile}")
            place = each["place"]
            if place == "inf":
                watched.place = float("inf")
            elif place is not None:
                watched.place = number(place, 0.0, 1e5, "the place of a quantile")
            watched.dependence = Dependence.from_dict(each["dependence"])
        return result
