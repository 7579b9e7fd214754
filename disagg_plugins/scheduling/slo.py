"""Split when the predicted TTFT and TPOT keep the request's SLO better that way.

Both choices are predicted from what was measured (``prediction``): whole on the best decode worker,
or read on the best prefill worker and written on a decode worker. Reading a prompt on a worker that
writes answers delays each of them, and what they lose counts like what the request itself loses.
So do the first tokens of requests that are being read for that worker elsewhere. Their own classes
are not known here: they are taken to have the bounds of this request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.policy import Policy, SchedulerPolicy
from disagg_plugins.scheduling.candidates import Candidates
from disagg_plugins.scheduling.prediction import (
    UNBOUNDED_OUTPUT_TOKENS,
    Predictor,
    UsesPredictor,
    expected_output,
)
from disagg_plugins.scheduling.prefill_slots import behind_queue
from disagg_plugins.scheduling.threshold import Threshold
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


PREDICTED = 3
"""Workers of each role for which times are predicted."""


AIM = 0.8
"""Share of the bounds that is aimed at where prefill workers write no answers. Predictions are
means: of requests predicted right at a bound half would miss it. In simulations of four workers
0.8 kept the bounds of more requests than 0.9 and 1. Where every worker does both, a split only
moves the disturbance, and aiming lower only made for more splits: there the bounds are taken as
they are."""

HALFWAY = 0.5
"""Of a split's TTFT has passed, on the average, for requests that are being read elsewhere."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one way of serving a request would come to.

    Attributes:
        ttft_s: Its TTFT from now.
        step_s: Its TPOT, and that of the answers beside it, undisturbed.
        tpot_s: The TPOT of the answers that its reading disturbs; ``step_s`` where there are none.
        disturbed: How many these are.
        cost_s: Its whole time, and the delays of the others, in request-seconds.
        delay_s: By which its reading holds up what is written on the same worker.
    """

    ttft_s: float
    step_s: float
    tpot_s: float
    disturbed: int
    cost_s: float
    delay_s: float = 0.0

    def excess(self, ttft_slo_s: float | None, tpot_slo_s: float | None) -> float:
        """Return by what shares bounds are missed because of this choice; 0 where all are kept.

        The share by which this request misses the worse of its two bounds, and for each answer
        that is disturbed the share by which it misses its bound more than it would anyway: sparing
        one request a late start is not worth eighteen slow answers.
        """
        own = max(_missed(self.ttft_s, ttft_slo_s), _missed(self.step_s, tpot_slo_s))
        others = _missed(self.tpot_s, tpot_slo_s) - _missed(self.step_s, tpot_slo_s)
        return own + self.disturbed * others


def _missed(value_s: float, bound_s: float | None) -> float:
    return 0.0 if bound_s is None else max(0.0, value_s / bound_s - 1.0)


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode worker that could write the answer."""

    worker: Worker
    step_s: float


class Slo(UsesPredictor):
    """Chooses what keeps both bounds; else the smaller excess; else the smaller time of all.

    Until each role has been measured (or a profile tells), it decides as ``threshold`` does.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        super().__init__(predictor)
        self._set(SchedulerPolicy())
        self._unmeasured = Threshold()

    def _set(self, rules: SchedulerPolicy) -> None:
        self._prefills = Candidates(rules.candidates)
        self._decodes = Candidates(rules.candidates)

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self._set(policy.scheduler)
        self._unmeasured.disagg_on_start(policy)

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        serving, load = fleet.serving(Role.PREFILL), fleet.load
        looked_at = self._prefills.of(serving)
        able = [w for w in looked_at if w.handoffs and _has_room(w, fleet)]
        prefills = _first(able, lambda w: load(w).prompt_tokens)
        if not prefills:
            word = "with room" if serving else "that is healthy"
            return SplitDecision(False, f"no prefill worker {word}")
        aimed, coming = profile, 0.0
        if all(worker.role is Role.PREFILL for worker in prefills):
            aimed = _aimed(profile)
            coming = sum(load(w).prefills for w in looked_at) / len(looked_at) * len(serving)
            coming /= max(1, len(fleet.serving(Role.DECODE)))
        with self.predictor.lock:
            self.predictor.catch_up()
            decodes = self._measured(profile, fleet)
            local = self._local(aimed, fleet, decodes)
            split = self._split(aimed, fleet, prefills, decodes)
        if local is None or split is None:
            # also where every decode worker is full: the Scheduler finds the way out
            decision = self._unmeasured.disagg_select_split(profile, fleet)
            return SplitDecision(decision.split, f"not measured yet: {decision.reason}")
        return _decision(profile, aimed, local, split, coming)

    def _measured(self, profile: RequestProfile, fleet: FleetView) -> list[_Decode]:
        own = profile.prompt_tokens + expected_output(profile.max_output_tokens) / 2
        found, load = [], fleet.load
        able = [w for w in self._decodes.of(fleet.serving(Role.DECODE)) if _has_room(w, fleet)]
        for worker in _first(able, lambda w: load(w).requests):
            step_s = self.predictor.step_s(worker, load(worker), own)
            if step_s is not None:
                found.append(_Decode(worker, step_s))
        return found

    def _local(
        self, profile: RequestProfile, fleet: FleetView, decodes: Iterable[_Decode]
    ) -> Choice | None:
        """Return the best choice of one worker for all, or None where nothing is measured."""
        choices = []
        for each in decodes:
            if not each.worker.whole:
                continue
            tokens = _unread(profile, each.worker)
            ttft_s = self.predictor.prefill_s(each.worker, fleet.load(each.worker), tokens)
            if ttft_s is not None:
                delay_s = self.predictor.delay_s(each.worker, tokens)
                choices.append(_choice(profile, fleet, each, ttft_s, each.worker, delay_s))
        return _best(profile, choices)

    def _split(
        self,
        profile: RequestProfile,
        fleet: FleetView,
        prefills: Sequence[Worker],
        decodes: Sequence[_Decode],
    ) -> Choice | None:
        """Return the best choice of two workers, or None where nothing is measured.

        The decode worker with the shortest step comes first, so that the pairs are no product of
        both lists. A handoff that was never measured counts as free: the first ones measure it.
        """
        able = [each for each in decodes if each.worker.handoffs]
        choices = []
        for decode in sorted(able, key=lambda each: each.step_s)[:1]:
            tokens = _unread(profile, decode.worker)
            handoff_s = self.predictor.handoff_s(decode.worker, tokens) or 0.0
            for worker in prefills:
                if worker.name == decode.worker.name or fleet.pair_problem(worker, decode.worker):
                    continue
                fresh = _unread(profile, worker)
                load = behind_queue(fleet.load(worker), profile.queued_tokens, fleet)
                read_s = self.predictor.prefill_s(worker, load, fresh)
                if read_s is None:
                    continue
                disturbed = worker.role is not Role.PREFILL
                delay_s = self.predictor.delay_s(worker, fresh) if disturbed else 0.0
                ttft_s = read_s + handoff_s
                choices.append(_choice(profile, fleet, decode, ttft_s, worker, delay_s))
        return _best(profile, choices)


def _choice(
    profile: RequestProfile,
    fleet: FleetView,
    decode: _Decode,
    ttft_s: float,
    reader: Worker,
    delay_s: float,
) -> Choice:
    """Return a choice; reading delays each answer that is written on ``reader`` by ``delay_s``."""
    load = fleet.load(reader)
    written = expected_output(profile.max_output_tokens)
    running = max(0, load.requests - load.prefills) if delay_s else 0
    tpot_s = decode.step_s
    if running:
        each = load.output_tokens / load.requests or UNBOUNDED_OUTPUT_TOKENS
        tpot_s += delay_s / each
    cost_s = ttft_s + written * decode.step_s + running * delay_s
    return Choice(ttft_s, decode.step_s, tpot_s, running, cost_s, delay_s)


def _aimed(profile: RequestProfile) -> RequestProfile:
    """Return the request with the bounds that are aimed at."""
    ttft_slo_s, tpot_slo_s = profile.ttft_slo_s, profile.tpot_slo_s
    if ttft_slo_s is None and tpot_slo_s is None:
        return profile
    return replace(
        profile,
        ttft_slo_s=None if ttft_slo_s is None else AIM * ttft_slo_s,
        tpot_slo_s=None if tpot_slo_s is None else AIM * tpot_slo_s,
    )


def _best(profile: RequestProfile, choices: Sequence[Choice]) -> Choice | None:
    ttft_slo_s, tpot_slo_s = profile.ttft_slo_s, profile.tpot_slo_s
    return min(choices, key=lambda c: (c.excess(ttft_slo_s, tpot_slo_s), c.cost_s), default=None)


def _first(workers: list[Worker], load: Callable[[Worker], int]) -> list[Worker]:
    """Return the least loaded of ``workers``: a prediction costs ten times such a look."""
    return workers if len(workers) <= PREDICTED else sorted(workers, key=load)[:PREDICTED]


def _has_room(worker: Worker, fleet: FleetView) -> bool:
    return fleet.load(worker).requests < worker.capacity


def _unread(profile: RequestProfile, worker: Worker) -> int:
    return max(0, profile.prompt_tokens - profile.cached_tokens.get(worker.name, 0))


def _decision(
    profile: RequestProfile, aimed: RequestProfile, local: Choice, split: Choice, coming: float
) -> SplitDecision:
    """Return the better choice.

    Args:
        profile: The request.
        aimed: The request with the bounds that are aimed at.
        local: The best choice of one worker.
        split: The best choice of two.
        coming: Requests that are being read elsewhere, for each decode worker: a prompt that is
            read there holds up their first tokens.
    """
    here, there = (c.excess(aimed.ttft_slo_s, aimed.tpot_slo_s) for c in (local, split))
    passed_s = HALFWAY * split.ttft_s
    late = _missed(passed_s + local.delay_s, aimed.ttft_slo_s) - _missed(passed_s, aimed.ttft_slo_s)
    local_cost_s = local.cost_s + coming * local.delay_s
    chosen = (there, split.cost_s) < (here + coming * late, local_cost_s)
    ttft_slo_s, tpot_slo_s = profile.ttft_slo_s, profile.tpot_slo_s
    best, other = (split, local) if chosen else (local, split)
    word, against = ("splitting", "local") if chosen else ("staying local", "split")
    reason = (
        f"{word}: TTFT {_seconds(best.ttft_s)} against {_seconds(other.ttft_s)} {against}, "
        f"TPOT {_ms(best.tpot_s)} against {_ms(other.tpot_s)}"
    )
    if ttft_slo_s is None and tpot_slo_s is None:
        whole = f"{_seconds(best.cost_s)} against {_seconds(other.cost_s)}"
        return SplitDecision(chosen, f"{reason}, with the delays of others {whole}; no SLO")
    first = "any" if ttft_slo_s is None else _seconds(ttft_slo_s)
    rest = "any" if tpot_slo_s is None else _ms(tpot_slo_s)
    keeps = any(c.excess(ttft_slo_s, tpot_slo_s) == 0.0 for c in (local, split))
    kept = "" if keeps else "; neither keeps it"
    return SplitDecision(chosen, f"{reason}, SLO {first} / {rest}{kept}")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.01 else f"{value:.4f} s"


def _ms(value_s: float) -> str:
    return f"{value_s * 1000:.3g} ms"
