"""The times of one request and what follows from them: TTFT, ITL, TPOT (sans-IO)."""

from __future__ import annotations

from array import array
from operator import sub
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.telemetry.metrics import Metrics
    from disagg_plugins.telemetry.records import RequestRecord


class Timeline:
    """Moments of one request on one monotonic clock, in seconds.

    Attributes:
        at_once: Tokens of the first piece: TPOT is the time of those that came after it.
    """

    __slots__ = ("arrival_s", "at_once", "prefill_end_s", "prefill_start_s", "stamp", "stamps_s")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.at_once = 1
        self.prefill_start_s = 0.0
        self.prefill_end_s = 0.0
        # one moment a forwarded read that carries output, 8 bytes each
        self.stamps_s = array("d")
        self.stamp = self.stamps_s.append

    @property
    def last_s(self) -> float:
        """When bytes were last forwarded; the arrival when none were."""
        return self.stamps_s[-1] if self.stamps_s else self.arrival_s

    def fill(self, record: RequestRecord, metrics: Metrics, now_s: float) -> None:
        """Write the times into the record and the histograms."""
        route = (record.route,)
        record.e2e_s = now_s - self.arrival_s
        if self.prefill_end_s:
            record.prefill_s = self.prefill_end_s - self.prefill_start_s
        stamps_s = self.stamps_s
        if not stamps_s:
            return
        record.ttft_s = stamps_s[0] - self.arrival_s
        metrics.observe("disagg_ttft_seconds", route, (record.ttft_s,))
        metrics.observe("disagg_e2e_seconds", route, (record.e2e_s,))
        if len(stamps_s) > 1:
            gaps_s = sorted(map(sub, stamps_s[1:], stamps_s))
            record.gaps_s = gaps_s
            metrics.observe("disagg_itl_seconds", route, gaps_s)
        tokens, at_once = record.output_tokens, self.at_once
        if tokens is None:  # nobody told: most engines write a token a piece
            tokens, at_once, record.tpot_by = len(stamps_s), 1, "pieces"
        if record.stream and tokens > at_once:
            record.tpot_s = (stamps_s[-1] - stamps_s[0]) / (tokens - at_once)
            metrics.observe("disagg_tpot_seconds", route, (record.tpot_s,))
