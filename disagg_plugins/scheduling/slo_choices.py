"""The ways of serving a request and what each would come to, for the rule ``slo`` (pure).

Reading a prompt on a worker that writes answers delays each of them, and what they lose counts like
what the request itself loses. So do the first tokens of requests that are being read for that
worker elsewhere. Their own classes are not known here: they are taken to have the bounds of this
request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from disagg_plugins.scheduling.prediction import (
    UNBOUNDED_OUTPUT_TOKENS,
    Predictor,
    expected_output,
    queue_share,
    unread_tokens,
)
from disagg_plugins.types import (
    IDLE,
    FleetView,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
    WorkerLoad,
)

PREDICTED: Final = 3
"""Workers of each role for which times are predicted."""

AIM: Final = 0.8
"""Share of the bounds that is aimed at where prefill workers write no answers. Predictions are
means: of requests predicted right at a bound half would miss it. In simulations of four workers
0.8 kept the bounds of more requests than 0.9 and 1. Where every worker does both, a split only
moves the disturbance, and aiming lower only made for more splits: there the bounds are taken as
they are."""

HALFWAY: Final = 0.5
"""Of a split's TTFT has passed, on the average, for requests that are being read elsewhere."""

Loaded = tuple[Worker, WorkerLoad]
"""A worker and its load."""

Writer = tuple[Worker, WorkerLoad, float]
"""A decode worker that could write the answer, its load, and the TPOT there in seconds."""


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

    def __init__(
        self,
        ttft_s: float,
        step_s: float,
        tpot_s: float,
        disturbed: int,
        cost_s: float,
        delay_s: float = 0.0,
    ) -> None:
        self.ttft_s = ttft_s
        self.step_s = step_s
        self.tpot_s = tpot_s
        self.disturbed = disturbed
        self.cost_s = cost_s
        self.delay_s = delay_s

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


class Bounds:
    """Bounds on TTFT and TPOT, in seconds; None: any."""

    def __init__(self, ttft_s: float | None, tpot_s: float | None) -> None:
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s

    def aimed(self) -> Bounds:
        """Return the bounds that are aimed at where prefill workers write no answers."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        return Bounds(
            None if ttft_s is None else AIM * ttft_s, None if tpot_s is None else AIM * tpot_s
        )


@dataclass(frozen=True, slots=True)
class Choices:
    """What a request may choose from.

    Attributes:
        local: The best way on one worker, or None where none is measured.
        split: The best way on two, or None.
        bounds: Of the request.
        aimed: The bounds that are aimed at.
        coming: Requests that are being read elsewhere, for each decode worker: a prompt that is
            read there holds up their first tokens.
    """

    local: Choice | None
    split: Choice | None
    bounds: Bounds
    aimed: Bounds
    coming: float

    def decision(self) -> SplitDecision | None:
        """Return the better choice; None where either is not measured."""
        if self.local is None or self.split is None:
            return None
        return _decision(self.bounds, self.aimed, self.local, self.split, self.coming)


def prefills_of(workers: Sequence[Worker], fleet: FleetView) -> list[Loaded]:
    """Return the least busy of prefill workers that take handoffs and have room."""
    able = [
        (worker, load)
        for worker, load in _loaded(workers, fleet)
        if worker.handoffs and load.requests < worker.capacity
    ]
    return able if len(able) <= PREDICTED else sorted(able, key=_queued)[:PREDICTED]


def choices(
    predictor: Predictor,
    profile: RequestProfile,
    fleet: FleetView,
    looked_at: Sequence[Worker],
    prefills: Sequence[Loaded],
    decodes: Sequence[Worker],
) -> Choices:
    """Return the ways of serving a request.

    Args:
        predictor: Held by the caller, and up to date.
        profile: The request.
        fleet: The workers.
        looked_at: Prefill workers, among which ``prefills`` were found; at least one.
        prefills: Those that it may be read on; at least one.
        decodes: Decode workers.
    """
    bounds = aimed = Bounds(profile.ttft_slo_s, profile.tpot_slo_s)
    coming = 0.0
    if all([worker.role is Role.PREFILL for worker, _ in prefills]):
        aimed = bounds.aimed()
        reading = sum([load.prefills for _, load in _loaded(looked_at, fleet)])
        coming = reading / len(looked_at) * len(fleet.serving(Role.PREFILL))
        coming /= max(1, len(fleet.serving(Role.DECODE)))
    writers = _writers(predictor, profile, fleet, decodes)
    local = _best(aimed, _local(predictor, profile, writers))
    split = _best(aimed, _split(predictor, profile, fleet, prefills, writers))
    return Choices(local, split, bounds, aimed, coming)


def _missed(value_s: float, bound_s: float | None) -> float:
    return 0.0 if bound_s is None or value_s <= bound_s else value_s / bound_s - 1.0


def _loaded(workers: Sequence[Worker], fleet: FleetView) -> list[Loaded]:
    loads = fleet.loads
    return [(worker, loads.get(worker.name, IDLE)) for worker in workers]


def _queued(each: Loaded) -> int:
    return each[1].prompt_tokens


def _requests(each: Loaded) -> int:
    return each[1].requests


def _step_s(each: Writer) -> float:
    return each[2]


def _writers(
    predictor: Predictor, profile: RequestProfile, fleet: FleetView, workers: Sequence[Worker]
) -> list[Writer]:
    """Return the least busy decode workers with room, as far as they are measured."""
    able = [
        (worker, load)
        for worker, load in _loaded(workers, fleet)
        if load.requests < worker.capacity
    ]
    if len(able) > PREDICTED:
        able = sorted(able, key=_requests)[:PREDICTED]
    own = profile.prompt_tokens + expected_output(profile.max_output_tokens) / 2
    found: list[Writer] = []
    for worker, load in able:
        step_s = predictor.step_s(worker, load, own)
        if step_s is not None:
            found.append((worker, load, step_s))
    return found


def _local(
    predictor: Predictor, profile: RequestProfile, writers: Sequence[Writer]
) -> list[Choice]:
    """Return the choices of one worker for all, as far as they are measured."""
    found, written = [], expected_output(profile.max_output_tokens)
    for worker, load, step_s in writers:
        if not worker.whole:
            continue
        tokens = unread_tokens(profile, worker)
        ttft_s = predictor.prefill_s(worker, load, tokens)
        if ttft_s is not None:
            delay_s = predictor.delay_s(worker, tokens)
            found.append(_choice(written, step_s, ttft_s, load, delay_s))
    return found


def _split(
    predictor: Predictor,
    profile: RequestProfile,
    fleet: FleetView,
    prefills: Sequence[Loaded],
    writers: Sequence[Writer],
) -> list[Choice]:
    """Return the choices of two workers, as far as they are measured.

    They are those of one decode worker, so that the pairs are no product of both lists: of the
    one with the shortest step that can share a handoff with one of ``prefills``. A handoff that
    was never measured counts as free: the first ones measure it.
    """
    found: list[Choice] = []
    written = expected_output(profile.max_output_tokens)
    ahead = queue_share(profile.queued_tokens, fleet)
    for decode, _, step_s in sorted(writers, key=_step_s):
        readers = _readers(decode, prefills, fleet)
        if not readers:
            continue
        handoff_s = predictor.handoff_s(decode, unread_tokens(profile, decode)) or 0.0
        for worker, load in readers:
            fresh = unread_tokens(profile, worker)
            read_s = predictor.prefill_s(worker, load, fresh, ahead)
            if read_s is None:
                continue
            disturbed = worker.role is not Role.PREFILL
            delay_s = predictor.delay_s(worker, fresh) if disturbed else 0.0
            found.append(_choice(written, step_s, read_s + handoff_s, load, delay_s))
        break
    return found


def _readers(decode: Worker, prefills: Sequence[Loaded], fleet: FleetView) -> list[Loaded]:
    """Return those of ``prefills`` that can hand over to a decode worker."""
    if not decode.handoffs:
        return []
    others = [each for each in prefills if each[0].name != decode.name]
    if not fleet.pair_problems:
        return others
    return [each for each in others if fleet.pair_problem(each[0], decode) is None]


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


def _best(bounds: Bounds, found: Sequence[Choice]) -> Choice | None:
    """Return the choice of the least excess, of equal ones the cheapest, of these the first."""
    best: Choice | None = None
    least = least_s = 0.0
    for each in found:
        excess = each.excess(bounds)
        if best is None or excess < least or (excess == least and each.cost_s < least_s):
            best, least, least_s = each, excess, each.cost_s
    return best


def _decision(
    bounds: Bounds, aimed: Bounds, local: Choice, split: Choice, coming: float
) -> SplitDecision:
    here, there = local.excess(aimed), split.excess(aimed)
    passed_s = HALFWAY * split.ttft_s
    late = _missed(passed_s + local.delay_s, aimed.ttft_s) - _missed(passed_s, aimed.ttft_s)
    local_cost_s = local.cost_s + coming * local.delay_s
    here += coming * late
    chosen = there < here or (there == here and split.cost_s < local_cost_s)
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
    return format(value, ".2f" if value >= 0.01 else ".4f") + " s"


def _ms(value_s: float) -> str:
    return format(value_s * 1000, ".3g") + " ms"
