"""Which share of requests kept its SLO, and the load at which that falls below a bound (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks.workloads import Slo

WANTED = 0.9
"""The share that a deployment is sized for, as DistServe has it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request got, in virtual seconds.

    Attributes:
        ttft_s: From its time of arrival to the first token; None: it failed.
        tpot_s: From the first to the last token over their number less one; None: one token.
    """

    ttft_s: float | None
    tpot_s: float | None = None

    def keeps(self, slo: Slo) -> bool:
        """Return whether it counts: a failed request does not, one token has no TPOT."""
        if self.ttft_s is None or self.ttft_s > slo.ttft_s:
            return False
        return self.tpot_s is None or self.tpot_s <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class Level:
    """What one policy did at one load."""

    rate: float
    share: float
    failed: int
    requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_p50_s: float
    tpot_p90_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def level(rate: float, outcomes: Sequence[Outcome], slo: Slo) -> Level:
    """Return the figures of one run."""
    ttft = [o.ttft_s for o in outcomes if o.ttft_s is not None]
    tpot = [o.tpot_s for o in outcomes if o.tpot_s is not None]
    kept = sum(o.keeps(slo) for o in outcomes)
    return Level(
        rate=rate,
        share=kept / len(outcomes) if outcomes else 0.0,
        failed=sum(o.ttft_s is None for o in outcomes),
        requests=len(outcomes),
        ttft_p50_s=median(ttft) if ttft else 0.0,
        ttft_p90_s=percentile(ttft, 0.9),
        tpot_p50_s=median(tpot) if tpot else 0.0,
        tpot_p90_s=percentile(tpot, 0.9),
    )


def rate_at(levels: Sequence[Level], wanted: float = WANTED) -> float:
    """Return the highest rate with ``wanted`` of the requests kept, between levels by a line.

    Below the lowest level shares are taken to grow to 1 at no load; above the highest nothing is
    assumed: its rate is the answer where it still keeps enough.
    """
    before = (0.0, 1.0)
    for each in sorted(levels, key=lambda each: each.rate):
        if each.share < wanted:
            rate, share = before
            if share <= each.share:
                return rate
            return rate + (each.rate - rate) * (share - wanted) / (share - each.share)
        before = (each.rate, each.share)
    return before[0]
