"""The typed facade of the scheduler hooks: what plugins may answer, and how answers combine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from operator import is_
from types import MappingProxyType
from typing import TypeVar

from disagg_plugins.hook_calls import HookCalls, NonsenseError
from disagg_plugins.scheduling.trace import CORE, Answers, Trace
from disagg_plugins.types import (
    FleetView,
    Refusal,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
)

T = TypeVar("T")

MAX_NOMINEES = 16
"""Of one plugin, for one request: every one of them costs a filter and a score."""

NEUTRAL_SCORE = 0.5
"""Given where no plugin has an opinion."""


class SchedulerHooks:
    """Asks the plugins and combines their answers; see ``hookspecs`` for each hook."""

    def __init__(self, calls: HookCalls) -> None:
        self._calls = calls

    def select_admission(
        self, profile: RequestProfile, fleet: FleetView, trace: Trace | None = None
    ) -> Refusal | None:
        """Return the first refusal; None admits."""
        found = self._calls.first(
            "disagg_select_admission", _instance(Refusal), {"profile": profile, "fleet": fleet}
        )
        if found is None:
            return None
        _note(trace, "admission", None, (found,))
        return found[1]

    def select_split(
        self,
        profile: RequestProfile,
        fleet: FleetView,
        trace: Trace | None = None,
        *,
        without: Collection[str] = (),
    ) -> SplitDecision | None:
        """Return the first decision; None when nobody has an opinion."""
        found = self._calls.first(
            "disagg_select_split",
            _instance(SplitDecision),
            {"profile": profile, "fleet": fleet},
            without=without,
        )
        if found is None:
            return None
        _note(trace, "split", None, (found,))
        return found[1]

    def nominate_workers(
        self,
        profile: RequestProfile,
        role: Role,
        fleet: FleetView,
        trace: Trace | None = None,
        *,
        without: Collection[str] = (),
    ) -> tuple[str, ...]:
        """Return the names of all nominated workers, each once."""
        answers = self._calls.every(
            "disagg_nominate_workers",
            _names,
            {"profile": profile, "role": role, "fleet": fleet},
            without=without,
        )
        _note(trace, "nominate", role, answers)
        found: dict[str, None] = {}
        for _, names in answers:
            for name in names:
                found[name] = None
        return tuple(found)

    def filter_workers(
        self,
        profile: RequestProfile,
        role: Role,
        workers: Sequence[Worker],
        fleet: FleetView,
        trace: Trace | None = None,
        other: Worker | None = None,
    ) -> tuple[tuple[Worker, ...], tuple[str, ...]]:
        """Return the workers that every plugin keeps, and the plugins that left some out."""
        arguments = _about(profile, role, workers, fleet, other)
        left_out_by = []
        kept: set[str] | None = None  # None: all
        answers = self._calls.every(
            "disagg_filter_workers", lambda answer: _kept_names(answer, workers), arguments
        )
        _note(trace, "filter", role, answers)
        for plugin, names in answers:
            if names is not None and len(names) < len(workers):
                left_out_by.append(plugin)
                kept = names if kept is None else kept & names
        if kept is None:
            return tuple(workers), ()
        return tuple(w for w in workers if w.name in kept), tuple(left_out_by)

    def score_workers(
        self,
        profile: RequestProfile,
        role: Role,
        workers: Sequence[Worker],
        fleet: FleetView,
        weights: Mapping[str, float],
        trace: Trace | None = None,
        other: Worker | None = None,
        *,
        without: Collection[str] = (),
    ) -> dict[str, float]:
        """Return each worker's weighted mean score, neutral where nobody has an opinion.

        Plugins named in ``without`` are not asked: those of weight 0 need not be.
        """
        combined = {worker.name: NEUTRAL_SCORE for worker in workers}
        answers = self._calls.every(
            "disagg_score_workers",
            lambda answer: _scores(answer, combined),
            _about(profile, role, workers, fleet, other),
            without=without,
            trusted=_trusted_scores,
        )
        _note(trace, "score", role, answers)
        weighed = [(weights.get(plugin, 1.0), scores) for plugin, scores in answers]
        for name in combined:
            total = weight_sum = 0.0
            for weight, scores in weighed:
                score = scores.get(name)
                if score is not None:
                    total += weight * score
                    weight_sum += weight
            if weight_sum:
                combined[name] = total / weight_sum
        _note(trace, "combined", role, ((CORE, combined),))
        return combined

    def select_worker(
        self,
        profile: RequestProfile,
        role: Role,
        scored: Mapping[str, float],
        trace: Trace | None = None,
        *,
        without: Collection[str] = (),
    ) -> str | None:
        """Return the first valid answer, a key of ``scored``, or None."""
        if not self._calls.asks("disagg_select_worker", without=without):
            return None

        def check(answer: object) -> str:
            if not isinstance(answer, str) or answer not in scored:
                raise NonsenseError(f"answered {answer!r}, not one of {', '.join(scored)}")
            return answer

        arguments = {"profile": profile, "role": role, "scored": MappingProxyType(dict(scored))}
        found = self._calls.first("disagg_select_worker", check, arguments, without=without)
        if found is None:
            return None
        _note(trace, "select", role, (found,))
        return found[1]

    def score_queue(
        self,
        profile: RequestProfile,
        weights: Mapping[str, float],
        *,
        without: Collection[str] = (),
    ) -> float:
        """Return how urgent a waiting request is, from 0 to 1."""
        answers = self._calls.every(
            "disagg_score_queue", _score, {"profile": profile}, without=without
        )
        return _mean((weights.get(plugin, 1.0), score) for plugin, score in answers)

    @property
    def wants_request_end(self) -> bool:
        """Whether some plugin implements ``disagg_on_request_end``."""
        return self._calls.asks("disagg_on_request_end")

    def on_request_end(self, record: Mapping[str, object]) -> None:
        """Tell every plugin how a request ended; they cannot change the record."""
        # not copied: it may be a view that makes its values when they are asked for
        self._calls.tell("disagg_on_request_end", {"record": MappingProxyType(record)})


def _note(trace: Trace | None, step: str, role: Role | None, answers: Answers) -> None:
    if trace is not None and answers:
        trace.note(step, role, answers)


def _about(
    profile: RequestProfile,
    role: Role,
    workers: Sequence[Worker],
    fleet: FleetView,
    other: Worker | None,
) -> dict[str, object]:
    return {
        "profile": profile,
        "role": role,
        "workers": workers,
        "fleet": fleet,
        "other": other,
    }


def _instance(kind: type[T]) -> Callable[[object], T]:
    def check(answer: object) -> T:
        if not isinstance(answer, kind):
            raise NonsenseError(f"answered {type(answer).__name__}, not {kind.__name__}")
        return answer

    return check


def _names(answer: object) -> Sequence[str]:
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence):
        raise NonsenseError(f"answered {type(answer).__name__}, not a list of names")
    if len(answer) > MAX_NOMINEES:
        raise NonsenseError(f"nominated {len(answer)} workers, more than {MAX_NOMINEES}")
    for name in answer:
        if not isinstance(name, str):
            raise NonsenseError(f"nominated a {type(name).__name__}, not a name")
    return answer


def _kept_names(answer: object, workers: Sequence[Worker]) -> set[str] | None:
    """Return the names a filter kept, or None for all, which is the usual and cheap case."""
    if type(answer) is list and len(answer) == len(workers) and all(map(is_, answer, workers)):
        return None
    return _worker_names(answer, {worker.name for worker in workers})


def _worker_names(answer: object, allowed: Collection[str]) -> set[str]:
    if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
        raise NonsenseError(f"answered {type(answer).__name__}, not a list of workers")
    names = set()
    for worker in answer:
        if not isinstance(worker, Worker):
            raise NonsenseError(f"answered a {type(worker).__name__} among the workers")
        if worker.name not in allowed:
            raise NonsenseError(f"answered worker {worker.name!r}, which was not asked about")
        names.add(worker.name)
    return names


def _trusted_scores(answer: object) -> dict[str, float]:
    """Return what a plugin of this project scored; its tests see to it that each is 0 to 1.

    Looking at every score of a dozen answers would cost a decision more than making them. A name
    that was not asked about is never looked up.
    """
    if type(answer) is not dict:
        raise NonsenseError(f"answered {type(answer).__name__}, not a dictionary of scores")
    return answer


def _scores(answer: object, allowed: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(answer, Mapping):
        raise NonsenseError(f"answered {type(answer).__name__}, not a mapping of scores")
    scores = {}
    for name, value in answer.items():
        if name not in allowed:
            raise NonsenseError(f"scored {name!r}, which was not asked about")
        scores[name] = _score(value)
    return scores


def _score(value: object) -> float:
    if type(value) is float:
        score = value
    elif isinstance(value, Real) and not isinstance(value, bool):
        score = float(value)  # an integer, or a number of numpy's
    else:
        raise NonsenseError(f"scored {value!r}, not a number")
    if not 0.0 <= score <= 1.0:  # also refuses NaN
        raise NonsenseError(f"scored {score!r}, outside 0 to 1")
    return score


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    total = weight_sum = 0.0
    for weight, score in weighted:
        total += weight * score
        weight_sum += weight
    return total / weight_sum if weight_sum else NEUTRAL_SCORE
