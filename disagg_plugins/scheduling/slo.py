"""Split when the predicted TTFT and TPOT keep the request's SLO better that way.

Both choices are predicted from what was measured (``prediction``): whole on the best decode worker,
or read on the best prefill worker and written on a decode worker. Reading a prompt on a worker that
writes answers delays each of them, and what they lose counts like what the request itself loses.
So do the first tokens of requests that are being read for that worker elsewhere. Their own classes
are not known here: they are taken to have the bounds of this request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
from disagg_plugins.types import (
    IDLE,
    FleetView,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
    WorkerLoad,
)

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


class Choice(NamedTuple):
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

    def excess(self, bounds: Bounds) -> float:
        """Return by what shares bounds are missed because of this choice; 0 where all are kept.

        The share by which this request misses the worse of its two bounds, and for each answer
        that is disturbed the share by which it misses its bound more than it would anyway: sparing
        one request a late start is not worth eighteen slow answers.
        """
        slow = _missed(self.step_s, bounds.tpot_s)
        own = max(_missed(self.ttft_s, bounds.ttft_s), slow)
        if not self.disturbed:
            return own
        return own + self.disturbed * (_missed(self.tpot_s, bounds.tpot_s) - slow)


class Bounds(NamedTuple):
    """Bounds on TTFT and TPOT, in seconds; None: any."""

    ttft_s: float | None
    tpot_s: float | None

    def aimed(self) -> Bounds:
        """Return the bounds that are aimed at where prefill workers write no answers."""
        ttft_s, tpot_s = self
        return Bounds(
            None if ttft_s is None else AIM * ttft_s, None if tpot_s is None else AIM * tpot_s
        )


def _missed(value_s: float, bound_s: float | None) -> float:
    return 0.0 if bound_s is None or value_s <= bound_s else value_s / bound_s - 1.0


class _Loaded(NamedTuple):
    """A worker and its load."""

    worker: Worker
    load: WorkerLoad

    @property
    def has_room(self) -> bool:
        return self.load.requests < self.worker.capacity


class _Decode(NamedTuple):
    """A decode worker that could write the answer."""

    worker: Worker
    load: WorkerLoad
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
        serving = fleet.serving(Role.PREFILL)
        looked_at = _loaded(self._prefills.of(serving), fleet)
        able = [each for each in looked_at if each.worker.handoffs and each.has_room]
        prefills = _first(able, lambda each: each.load.prompt_tokens)
        if not prefills:
            word = "with room" if serving else "that is healthy"
            return SplitDecision(False, f"no prefill worker {word}")
        bounds = aimed = Bounds(profile.ttft_slo_s, profile.tpot_slo_s)
        coming = 0.0
        if all(each.worker.role is Role.PREFILL for each in prefills):
            aimed = bounds.aimed()
            reading = sum(each.load.prefills for each in looked_at)
            coming = reading / len(looked_at) * len(serving)
            coming /= max(1, len(fleet.serving(Role.DECODE)))
        with self.predictor.lock:
            self.predictor.catch_up()
            decodes = self._measured(profile, fleet)
            local = _best(aimed, self._local(profile, decodes))
            split = _best(aimed, self._split(profile, fleet, prefills, decodes))
        if local is None or split is None:
            # also where every decode worker is full: the Scheduler finds the way out
            decision = self._unmeasured.disagg_select_split(profile, fleet)
            return SplitDecision(decision.split, f"not measured yet: {decision.reason}")
        return _decision(bounds, aimed, local, split, coming)

    def _measured(self, profile: RequestProfile, fleet: FleetView) -> list[_Decode]:
        own = profile.prompt_tokens + expected_output(profile.max_output_tokens) / 2
        found = []
        looked_at = _loaded(self._decodes.of(fleet.serving(Role.DECODE)), fleet)
        able = [each for each in looked_at if each.has_room]
        for worker, load in _first(able, lambda each: each.load.requests):
            step_s = self.predictor.step_s(worker, load, own)
            if step_s is not None:
                found.append(_Decode(worker, load, step_s))
        return found

    def _local(self, profile: RequestProfile, decodes: Iterable[_Decode]) -> list[Choice]:
        """Return the choices of one worker for all, as far as they are measured."""
        choices, written = [], expected_output(profile.max_output_tokens)
        for worker, load, step_s in decodes:
            if not worker.whole:
                continue
            tokens = _unread(profile, worker)
            ttft_s = self.predictor.prefill_s(worker, load, tokens)
            if ttft_s is not None:
                delay_s = self.predictor.delay_s(worker, tokens)
                choices.append(_choice(written, step_s, ttft_s, load, delay_s))
        return choices

    def _split(
        self,
        profile: RequestProfile,
        fleet: FleetView,
        prefills: Sequence[_Loaded],
        decodes: Sequence[_Decode],
    ) -> list[Choice]:
        """Return the choices of two workers, as far as they are measured.

        They are those of one decode worker, so that the pairs are no product of both lists: of the
        one with the shortest step that can share a handoff with one of ``prefills``. A handoff that
        was never measured counts as free: the first ones measure it.
        """
        predictor, written = self.predictor, expected_output(profile.max_output_tokens)
        for decode in sorted(decodes, key=lambda each: each.step_s):
            readers = _readers(decode.worker, prefills, fleet)
            if not readers:
                continue
            choices = []
            tokens = _unread(profile, decode.worker)
            handoff_s = predictor.handoff_s(decode.worker, tokens) or 0.0
            for worker, now in readers:
                fresh = _unread(profile, worker)
                load = behind_queue(now, profile.queued_tokens, fleet)
                read_s = predictor.prefill_s(worker, load, fresh)
                if read_s is None:
                    continue
                disturbed = worker.role is not Role.PREFILL
                delay_s = predictor.delay_s(worker, fresh) if disturbed else 0.0
                choices.append(_choice(written, decode.step_s, read_s + handoff_s, now, delay_s))
            return choices
        return []


def _readers(decode: Worker, prefills: Sequence[_Loaded], fleet: FleetView) -> Sequence[_Loaded]:
    """Return those of ``prefills`` that can hand over to a decode worker."""
    if not decode.handoffs:
        return ()
    others = [each for each in prefills if each.worker.name != decode.name]
    if not fleet.pair_problems:
        return others
    return [each for each in others if fleet.pair_problem(each.worker, decode) is None]


def _choice(
    written: int, step_s: float, ttft_s: float, reader: WorkerLoad, delay_s: float
) -> Choice:
    """Return a choice; reading delays each answer that is written at the reader by ``delay_s``."""
    running = max(0, reader.requests - reader.prefills) if delay_s else 0
    tpot_s = step_s
    if running:
        each = reader.output_tokens / reader.requests or UNBOUNDED_OUTPUT_TOKENS
        tpot_s += delay_s / each
    cost_s = ttft_s + written * step_s + running * delay_s
    return Choice(ttft_s, step_s, tpot_s, running, cost_s, delay_s)


def _best(bounds: Bounds, choices: Sequence[Choice]) -> Choice | None:
    return min(choices, key=lambda each: (each.excess(bounds), each.cost_s), default=None)


def _loaded(workers: Sequence[Worker], fleet: FleetView) -> list[_Loaded]:
    load = fleet.loads.get
    return [_Loaded(worker, load(worker.name, IDLE)) for worker in workers]


def _first(workers: list[_Loaded], load: Callable[[_Loaded], int]) -> list[_Loaded]:
    """Return the least loaded of ``workers``: a prediction costs ten times such a look."""
    return workers if len(workers) <= PREDICTED else sorted(workers, key=load)[:PREDICTED]


def _unread(profile: RequestProfile, worker: Worker) -> int:
    return max(0, profile.prompt_tokens - profile.cached_tokens.get(worker.name, 0))


def _decision(
    bounds: Bounds, aimed: Bounds, local: Choice, split: Choice, coming: float
) -> SplitDecision:
    """Return the better choice.

    Args:
        bounds: Of the request.
        aimed: The bounds that are aimed at.
        local: The best choice of one worker.
        split: The best choice of two.
        coming: Requests that are being read elsewhere, for each decode worker: a prompt that is
            read there holds up their first tokens.
    """
    here, there = local.excess(aimed), split.excess(aimed)
    passed_s = HALFWAY * split.ttft_s
    late = _missed(passed_s + local.delay_s, aimed.ttft_s) - _missed(passed_s, aimed.ttft_s)
    local_cost_s = local.cost_s + coming * local.delay_s
    chosen = (there, split.cost_s) < (here + coming * late, local_cost_s)
    best, other = (split, local) if chosen else (local, split)
    word, against = ("splitting", "local") if chosen else ("staying local", "split")
    reason = (
        f"{word}: TTFT {_seconds(best.ttft_s)} against {_seconds(other.ttft_s)} {against}, "
        f"TPOT {_ms(best.tpot_s)} against {_ms(other.tpot_s)}"
    )
    if bounds.ttft_s is None and bounds.tpot_s is None:
        whole = f"{_seconds(best.cost_s)} against {_seconds(other.cost_s)}"
        return SplitDecision(chosen, f"{reason}, with the delays of others {whole}; no SLO")
    first = "any" if bounds.ttft_s is None else _seconds(bounds.ttft_s)
    rest = "any" if bounds.tpot_s is None else _ms(bounds.tpot_s)
    keeps = local.excess(bounds) == 0.0 or split.excess(bounds) == 0.0
    kept = "" if keeps else "; neither keeps it"
    return SplitDecision(chosen, f"{reason}, SLO {first} / {rest}{kept}")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.01 else f"{value:.4f} s"


def _ms(value_s: float) -> str:
    return f"{value_s * 1000:.3g} ms"
