"""How busy the two roles were over the last seconds (sans-IO).

Prefill: the share of its workers that were reading a prompt, and how long prompts took beyond what
their length explains, which is the wait in the worker's queue. Decode: requests against capacity,
and the time from the end of prefill to the first bytes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.placement.types import RoleLoad
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.telemetry.records import RequestRecord
    from disagg_plugins.types import FleetView

MAX_ENDS = 4096
"""Requests remembered; at more than that in a window the oldest are forgotten, and rates are taken
over the time that is left."""

MAX_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class _End:
    at_s: float
    prompt_tokens: int
    prefill_s: float | None
    decode_wait_s: float | None
    output_tokens: int


class RoleLoads:
    """Keeps samples of the fleet and ends of requests for one window.

    Args:
        window_s: Its length in seconds.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=MAX_SAMPLES)
        self._ends: deque[_End] = deque(maxlen=MAX_ENDS)

    def sample(self, now_s: float, fleet: FleetView) -> None:
        """Look at every worker once."""
        self._samples.append((now_s, _reading(fleet), _decoding(fleet)))

    def ended(self, now_s: float, record: RequestRecord) -> None:
        """Take the end of a request that was answered."""
        if record.outcome != "ok":
            return
        prefill_s = record.prefill_s
        wait_s = None
        if prefill_s is not None and record.ttft_s is not None:
            wait_s = max(0.0, record.ttft_s - prefill_s)
        tokens = record.prompt_tokens or record.prompt_tokens_estimate
        self._ends.append(_End(now_s, tokens, prefill_s, wait_s, record.output_tokens or 0))

    def window(self, now_s: float) -> dict[Role, RoleLoad]:
        """Return the load of both roles up to now."""
        begin_s = now_s - self._window_s
        while self._samples and self._samples[0][0] < begin_s:
            self._samples.popleft()
        while self._ends and self._ends[0].at_s < begin_s:
            self._ends.popleft()
        full = len(self._ends) == MAX_ENDS
        length_s = max(now_s - self._ends[0].at_s, 1e-3) if full else self._window_s
        ends, read = self._ends, [end for end in self._ends if end.prefill_s is not None]
        return {
            Role.PREFILL: RoleLoad(
                length_s,
                _mean([sample[1] for sample in self._samples]),
                _p99(_waits_s(read)),
                len(read) / length_s,
                sum(end.prompt_tokens for end in read) / length_s,
            ),
            Role.DECODE: RoleLoad(
                length_s,
                _mean([sample[2] for sample in self._samples]),
                _p99([e.decode_wait_s for e in ends if e.decode_wait_s is not None]),
                len(ends) / length_s,
                sum(end.output_tokens for end in ends) / length_s,
            ),
        }


def _reading(fleet: FleetView) -> float:
    serving = fleet.serving(Role.PREFILL)
    return _mean([1.0 if fleet.load(w).prefills else 0.0 for w in serving])


def _decoding(fleet: FleetView) -> float:
    serving = fleet.serving(Role.DECODE)
    capacity = sum(w.capacity for w in serving)
    writing = sum(max(0, fleet.load(w).requests - fleet.load(w).prefills) for w in serving)
    return min(1.0, writing / capacity) if capacity else 0.0


def _waits_s(read: Sequence[_End]) -> list[float]:
    """Return how long each prompt took beyond the best speed of the window."""
    best = min(((e.prefill_s or 0.0) / max(1, e.prompt_tokens) for e in read), default=0.0)
    return [max(0.0, (e.prefill_s or 0.0) - best * e.prompt_tokens) for e in read]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))] if values else 0.0
