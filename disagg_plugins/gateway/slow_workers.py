"""Takes workers out that are far slower than their peers, and bounds who may be out for that.

The bounds follow Envoy's outlier detection: at most a share of a role at once
(``max_ejection_percent``, 10 % there and a third here, as fleets are smaller), a rest that grows
with each time in a row (``base_ejection_time`` times the count), and nothing of it while too many
are ill for other reasons (the panic threshold, 50 %): then slow is better than nothing.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from disagg_plugins.gateway.outliers import PIECES, READING, TPOT, Answer, Outliers
from disagg_plugins.gateway.role_lists import PHASES
from disagg_plugins.scheduling.prediction import kind_of

if TYPE_CHECKING:
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.outliers import Verdict
    from disagg_plugins.gateway.worker_state import WorkerState
    from disagg_plugins.telemetry.metrics import Metrics
    from disagg_plugins.telemetry.records import RequestRecord
    from disagg_plugins.types import Role

log = logging.getLogger(__name__)

LEAST_TOKENS = 8
"""Of an answer whose TPOT counts: one hiccup makes the TPOT of a shorter one."""

MOST_OUT = 1 / 3
"""Share of a role's workers that rest for slowness at once."""

LEAST_IN = 1 / 2
"""Share of a role's workers that stay in use: Envoy's panic threshold."""


class SlowWorkers:
    """Hears how requests ended, and lets slow workers rest.

    Args:
        fleet: Is told who rests, and who is as quick as its peers.
        metrics: Where it is counted.
        factor: How many times slower than its peers is slow; None: nobody ever is.
    """

    def __init__(self, fleet: FleetState, metrics: Metrics, factor: float | None) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._factor = factor
        self._all = tuple(Outliers(m, factor or float("inf")) for m in (TPOT, PIECES, READING))
        self._tokens, self._pieces, self._reading = self._all
        self._told: set[str] = set()  # slow workers that had to stay in use
        metrics.gauge(
            "disagg_slow_workers",
            "Workers that rest because they were far slower than their peers.",
            lambda: sum(state.slow for state in fleet.states.values()),
        )

    def ended(self, now_s: float, record: RequestRecord) -> None:
        """A request ended; only what went well on its first way says how fast a worker is."""
        if self._factor is None or record.outcome != "ok":
            return
        if record.retries or record.resumes or record.failures:
            return
        began_s = now_s - (record.e2e_s or 0.0)
        written = record.output_tokens or len(record.gaps_s or ()) + 1
        if written >= LEAST_TOKENS and record.stream and record.ttft_s is not None:
            outliers = self._pieces if record.output_tokens is None else self._tokens
            seconds = record.tpot_s or (now_s - began_s - record.ttft_s) / (written - 1)
            answer = Answer(now_s, seconds, _writing_loads(record, written))
            self._hear(outliers, record.decode, answer, began_s)
        if record.prefill is not None and record.prefill_s:
            answer = Answer(now_s, record.prefill_s, _reading_loads(record))
            self._hear(self._reading, record.prefill, answer, began_s)

    def gone(self, name: str) -> None:
        """A worker left the fleet: nothing is kept of it."""
        for outliers in self._all:
            outliers.gone(name)
        self._told.discard(name)
        self._metrics.forget("disagg_slow_outs", 0, name)

    def _hear(self, outliers: Outliers, name: str, answer: Answer, began_s: float) -> None:
        state = self._fleet.states.get(name)
        if state is None or not state.healthy:
            return
        group = state.worker.role, kind_of(state.worker)
        verdict = outliers.hear(group, name, answer, began_s=began_s)
        if verdict is None:
            return
        if verdict.slow:
            self._slow(state, outliers, verdict, answer.at_s)
        elif verdict.quick:
            self._told.discard(name)
            state.slow_outs = 0

    def _slow(self, state: WorkerState, outliers: Outliers, verdict: Verdict, now_s: float) -> None:
        name, said = state.worker.name, _said(outliers, verdict)
        why = self._must_stay(state)
        if why is not None:
            if name not in self._told:
                self._told.add(name)
                log.warning("worker %s is %s; it stays in use: %s", name, said, why)
            return
        self._told.discard(name)
        for each in self._all:
            each.rests(name, now_s)
        self._fleet.slow(name, said)
        self._metrics.count("disagg_slow_outs", (name, outliers.measure.name))
        log.warning("worker %s rests: it is %s", name, said)

    def _must_stay(self, state: WorkerState) -> str | None:
        """Return why a slow worker cannot be spared, or None."""
        for role in PHASES:
            if state.worker.role.serves(role):
                why = self._too_few(role)
                if why is not None:
                    return why
        return None

    def _too_few(self, role: Role) -> str | None:
        states = self._fleet.states.values()
        members = [s for s in states if s.worker.role.serves(role) and not s.draining]
        if any(s.kept for s in members):
            return f"every {role} worker is ill, the least bad one is in use"
        slow, healthy = sum(s.slow for s in members), sum(s.healthy for s in members)
        if slow + 1 > len(members) * MOST_OUT:
            return f"{slow} of {len(members)} {role} workers rest for slowness already"
        if healthy - 1 < len(members) * LEAST_IN:
            return f"only {healthy} of {len(members)} {role} workers are in use"
        return None


def _said(outliers: Outliers, verdict: Verdict) -> str:
    return (
        f"slow: its {outliers.measure.name} of {verdict.seconds:.3g} s (median of "
        f"{verdict.answers}) is {verdict.ratio:.1f} times what its load explains beside "
        f"{verdict.peers} peers with {verdict.peers_s:.3g} s (policy key gateway.slow_factor)"
    )


def _writing_loads(record: RequestRecord, written: int) -> tuple[float, ...]:
    """Return the load under which an answer was written (see ``outliers.TPOT``)."""
    prompt_tokens = record.prompt_tokens or record.prompt_tokens_estimate
    return (
        record.decode_requests + 1.0,
        record.decode_kv_tokens + prompt_tokens + written / 2,
        record.decode_read_tokens / max(1, written - 1),
    )


def _reading_loads(record: RequestRecord) -> tuple[float, ...]:
    """Return the load under which a prompt was read (see ``outliers.READING``)."""
    tokens = record.prompt_tokens_estimate
    fresh = tokens - record.prefill_cached_tokens
    queued = record.prefill_queued_tokens
    pairs = (fresh + queued) * (tokens + queued)
    return float(fresh + queued), float(pairs), record.prefill_requests + 1.0
