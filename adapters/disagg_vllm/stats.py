"""Connector statistics in vLLM's own form: logged by it and exported on its ``/metrics``.

Imports vLLM; loaded inside the engine only.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

METRICS = {
    "published": "Handoffs whose KV this worker published.",
    "published_bytes": "Bytes of KV published.",
    "publish_failed": "Prefills that could not be published.",
    "loaded": "Loads of KV from a prefill worker that succeeded, counted a rank.",
    "loaded_bytes": "Bytes of KV loaded.",
    "loaded_tokens": "Prompt tokens loaded, counted a rank.",
    "load_failed": "Loads that failed; the prompt was computed here.",
    "load_seconds": "Seconds spent loading.",
    "consumed": "Published handoffs that a decode worker took.",
    "expired": "Published handoffs that nobody took before their lease ended.",
    "failed": "Published handoffs that ended in an error.",
    "rejected": "Requests with a false or stale handoff.",
    "mismatched": "Requests whose prompt the two workers read differently.",
    "staging_full": "Prefills that ran unpublished for lack of staging.",
    "aborted": "Requests aborted before their handoff was published.",
}


@dataclass
class DisaggStats(KVConnectorStats):
    """Counts since the last report; ``data`` maps the names of ``METRICS`` to numbers."""

    def reset(self) -> None:
        """Start again from nothing."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add ``other`` to this and return this."""
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log line shows."""
        shown = {f"disagg_{k}": round(v, 3) for k, v in sorted(self.data.items())}
        if seconds := self.data.get("load_seconds"):
            shown["disagg_load_mb_per_s"] = round(
                self.data.get("loaded_bytes", 0) / seconds / 1e6, 1
            )
        return shown

    def is_empty(self) -> bool:
        """Return whether nothing happened."""
        return not any(self.data.values())


class StatsCollector:
    """Counts from any thread; drained once a step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, name: str, amount: float = 1) -> None:
        """Add ``amount`` to the metric ``name``."""
        with self._lock:
            self._counts[name] += amount  # type: ignore[assignment]

    def drain(self) -> DisaggStats | None:
        """Return the counts since the last call, or None."""
        with self._lock:
            if not self._counts:
                return None
            counts, self._counts = self._counts, Counter()
        return DisaggStats(data=dict(counts))


class DisaggPromMetrics(KVConnectorPromMetrics):
    """``vllm:disagg_*_total`` on vLLM's own metrics page."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[tuple[str, int], Any] = {}
        for name, documentation in METRICS.items():
            family = self._counter_cls(
                name=f"vllm:disagg_{name}", documentation=documentation, labelnames=labelnames
            )
            for engine, values in per_engine_labelvalues.items():
                self._counters[name, engine] = family.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval's counts."""
        for name, amount in transfer_stats_data.items():
            if (counter := self._counters.get((name, engine_idx))) is not None and amount > 0:
                counter.inc(amount)
