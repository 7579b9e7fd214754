"""The times of one request and what follows from them: TTFT, ITL, TPOT (sans-IO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.telemetry.metrics import Metrics
    from disagg_plugins.telemetry.records import RequestRecord

MAX_GAPS = 65_536
"""Gaps kept of one answer (half a megabyte); later ones are not looked at."""


class Timeline:
    """Moments of one request on one monotonic clock, in seconds."""

    __slots__ = ("arrival_s", "first_s", "gaps_s", "last_s", "prefill_end_s", "prefill_start_s")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.prefill_start_s = 0.0
        self.prefill_end_s = 0.0
        self.first_s = 0.0
        self.last_s = 0.0
        self.gaps_s: list[float] = []

    def chunk(self, now_s: float) -> None:
        """More bytes were forwarded to the client."""
        if self.first_s == 0.0:
            self.first_s = now_s
        elif len(self.gaps_s) < MAX_GAPS:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s

    def fill(self, record: RequestRecord, metrics: Metrics, now_s: float) -> None:
        """Write the times into the record and the histograms."""
        route = (record.route,)
        record.e2e_s = now_s - self.arrival_s
        if self.prefill_end_s:
            record.prefill_s = self.prefill_end_s - self.prefill_start_s
        if not self.first_s:
            return
        record.ttft_s = self.first_s - self.arrival_s
        metrics.observe("disagg_ttft_seconds", route, (record.ttft_s,))
        metrics.observe("disagg_e2e_seconds", route, (record.e2e_s,))
        if self.gaps_s:
            self.gaps_s.sort()
            record.gaps_s = self.gaps_s
            metrics.observe("disagg_itl_seconds", route, self.gaps_s)
        tokens = record.output_tokens or 0
        if record.stream and tokens > 1:
            record.tpot_s = (self.last_s - self.first_s) / (tokens - 1)
            metrics.observe("disagg_tpot_seconds", route, (record.tpot_s,))
