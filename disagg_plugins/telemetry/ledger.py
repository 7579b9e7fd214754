"""Joins a request's record with what its two workers report of the handoff (sans-IO).

A handoff is opened when it is minted, hears reports at any time, and is settled when the request
is over and the reports are complete, or when ``report_wait_s`` has passed since its end. Settled
means: counted, judged (did the split happen?) and handed on, exactly once.

Where the engine's own transport carries handoffs nobody reports. What is known then: prefill
answered with parameters and decode answered to them, which is called ``unobserved``; or the request
fell back, which is no split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.telemetry.records import HandoffRecord, RequestRecord

if TYPE_CHECKING:
    from disagg_plugins.telemetry.metrics import Metrics

ENDED_EARLY = ("client_gone", "rejected", "deadline", "closed")
"""Outcomes of requests that ended before a split could show."""

UNOBSERVED = "unobserved"
"""A handoff that the engine's own transport carried, as far as anybody here knows."""

ENDED_BY_PREFILL = "no: ended by prefill"
"""A split of which nothing was left to hand over."""

MAX_TEXT_CHARS = 300
"""Words of a report are cut to this length."""


@dataclass(slots=True)
class _Entry:
    handoff: HandoffRecord
    observed: bool = True
    record: RequestRecord | None = None
    until_s: float = 0.0
    loaded: bool = False
    failed: bool = False
    published: bool = False
    ended: bool = False


class HandoffLedger:
    """All handoffs that are not settled yet.

    Args:
        metrics: Where outcomes are counted.
        wait_s: How long the record of an ended request waits for reports.
        settle: Takes each finished record.
    """

    def __init__(
        self, metrics: Metrics, *, wait_s: float, settle: Callable[[RequestRecord], None]
    ) -> None:
        self._metrics = metrics
        self._wait_s = wait_s
        self._settle = settle
        self._open: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, handoff_id: str) -> bool:
        return handoff_id in self._open

    def open(self, handoff_id: str, *, observed: bool = True) -> None:
        """Begin to listen for reports of a handoff; where it is not ``observed`` none will come."""
        handoff = HandoffRecord(handoff_id, report="missing" if observed else "none")
        self._open[handoff_id] = _Entry(handoff, observed)

    def close(self, handoff_id: str, record: RequestRecord, now_s: float) -> None:
        """The request is over; settle now or once the reports are complete."""
        entry = self._open.get(handoff_id)
        if entry is None:  # it failed before the handoff was opened
            self._settle(record)
            return
        record.handoff = entry.handoff
        entry.record = record
        entry.until_s = now_s + self._wait_s
        if _nothing_to_wait_for(entry, record):
            self._end(handoff_id, entry)

    def report(self, report: Mapping[str, object]) -> bool:
        """Take one report; False when its handoff is unknown or settled."""
        handoff_id = str(report.get("handoff_id"))
        entry = self._open.get(handoff_id)
        if entry is None:
            return False
        _READERS[str(report["kind"])](entry, report)
        if entry.record is not None and _nothing_to_wait_for(entry, entry.record):
            self._end(handoff_id, entry)
        return True

    def sweep(self, now_s: float) -> None:
        """Settle what has waited long enough."""
        late = [
            (handoff_id, entry)
            for handoff_id, entry in self._open.items()
            if entry.record is not None and now_s >= entry.until_s
        ]
        for handoff_id, entry in late:
            self._end(handoff_id, entry)

    def settle_all(self) -> None:
        """Settle every ended request now, for shutdown."""
        self.sweep(float("inf"))

    def _end(self, handoff_id: str, entry: _Entry) -> None:
        record = entry.record
        del self._open[handoff_id]
        if record is None:
            return
        handoff = entry.handoff
        if entry.loaded or entry.failed:
            handoff.report = "complete"
        if handoff.outcome is None:
            handoff.outcome = _outcome(entry, record)
        self._judge(entry, record)
        self._metrics.count("disagg_handoffs", (handoff.outcome or "unknown",))
        if handoff.tokens_loaded:
            self._metrics.count("disagg_tokens_from_handoff", (), handoff.tokens_loaded)
        if handoff.tokens_recomputed:
            self._metrics.count("disagg_tokens_recomputed", (), handoff.tokens_recomputed)
        if handoff.bytes:
            self._metrics.count("disagg_kv_bytes", (handoff.transport or "unknown",), handoff.bytes)
        self._settle(record)

    def _judge(self, entry: _Entry, record: RequestRecord) -> None:
        """Say whether the split happened, and count when it did not."""
        handoff = entry.handoff
        if handoff.tokens_loaded > 0 or (entry.loaded and handoff.tokens_local > 0):
            record.split = "yes"
            return
        if record.ended_by_prefill:
            record.split = ENDED_BY_PREFILL
            return
        if handoff.outcome == UNOBSERVED:
            record.split = UNOBSERVED
            return
        if record.outcome in ENDED_EARLY or record.hedge == "won":
            record.split = f"no: {record.outcome if record.outcome in ENDED_EARLY else 'hedged'}"
            return
        if record.failures:
            first = record.failures[0]
            reason = f"{first.side} {first.kind}"
        elif entry.failed:
            reason = "load failed"
        elif entry.loaded:
            reason = "nothing loaded"
        else:
            reason = "no report" if entry.observed else record.outcome
        record.split = f"no: {reason}"
        self._metrics.count("disagg_split_not_happening", (reason,))


def _nothing_to_wait_for(entry: _Entry, record: RequestRecord) -> bool:
    if entry.loaded or entry.failed:
        return entry.published and entry.ended
    if not entry.observed or record.ended_by_prefill or record.hedge == "won":
        return True
    return bool(record.failures) or record.outcome in (*ENDED_EARLY, "error")


def _outcome(entry: _Entry, record: RequestRecord) -> str:
    if entry.failed:
        return "failed"
    if entry.loaded:
        return "consumed"
    if record.ended_by_prefill:
        return "not_needed"
    if not entry.observed and _carried(record):
        return UNOBSERVED
    if record.outcome in ("client_gone", "deadline", "closed") or record.hedge == "won":
        return "cancelled"
    if record.failures or record.outcome == "rejected":
        early = bool(record.failures) and record.failures[0].side == "prefill"
        return "not_published" if early else "abandoned"
    return "unknown"


def _carried(record: RequestRecord) -> bool:
    """Return whether decode began to answer to the handoff, whatever came after."""
    fell_back = record.retries > 0 or any(f.side == "prefill" for f in record.failures)
    return record.status == 200 and not fell_back and record.hedge != "won"


def _published(entry: _Entry, report: Mapping[str, object]) -> None:
    entry.published = True
    entry.handoff.published_tokens = _int(report, "num_tokens")
    entry.handoff.publish_s = _number(report, "seconds")


def _loaded(entry: _Entry, report: Mapping[str, object]) -> None:
    """Ranks may report one by one: bytes add up, token counts are the request's."""
    entry.loaded = True
    handoff = entry.handoff
    handoff.bytes += _int(report, "bytes")
    handoff.tokens_loaded = max(handoff.tokens_loaded, _int(report, "num_tokens"))
    handoff.tokens_local = max(handoff.tokens_local, _int(report, "tokens_local"))
    handoff.tokens_recomputed = max(
        handoff.tokens_recomputed or 0, _int(report, "tokens_recomputed")
    )
    handoff.transport = _text(report, "transport") or handoff.transport
    handoff.form = _text(report, "form") or handoff.form
    handoff.load_s = max(handoff.load_s or 0.0, _number(report, "seconds"))


def _failed(entry: _Entry, report: Mapping[str, object]) -> None:
    entry.failed = True
    entry.handoff.problem = _text(report, "problem") or "the worker did not say"
    if "tokens_recomputed" in report:
        entry.handoff.tokens_recomputed = _int(report, "tokens_recomputed")


def _ended(entry: _Entry, report: Mapping[str, object]) -> None:
    entry.ended = True
    entry.handoff.outcome = _text(report, "outcome") or "unknown"


_READERS: dict[str, Callable[[_Entry, Mapping[str, object]], None]] = {
    "published": _published,
    "loaded": _loaded,
    "failed": _failed,
    "ended": _ended,
}


def _int(report: Mapping[str, object], key: str) -> int:
    value = report.get(key)
    return value if type(value) is int and 0 <= value < 1 << 62 else 0


def _number(report: Mapping[str, object], key: str) -> float:
    value = report.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


def _text(report: Mapping[str, object], key: str) -> str | None:
    value = report.get(key)
    return value[:MAX_TEXT_CHARS] if isinstance(value, str) and value else None
