"""All guardrails together: the evidence of both arms, and what to do about it (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from disagg_plugins.canary.comparison import QuantileComparison, mean_above, mean_below
from disagg_plugins.canary.guardrail import Answer, Figure, Guardrail, Verdict, verdict
from disagg_plugins.canary.metrics import ARMS, METRICS, Arm
from disagg_plugins.canary.state import known, number
from disagg_plugins.canary.tally import AmountTally, ShareTally
from disagg_plugins.errors import ConfigError, DamagedState

if TYPE_CHECKING:
    from disagg_plugins.canary.comparison import Factors
    from disagg_plugins.canary.evidence import Logs
    from disagg_plugins.canary.histogram import Histogram
    from disagg_plugins.canary.metrics import Outcome

Action = Literal["rollback", "promote", "wait"]

VERSION = 1
"""Of the stored state."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What to do, and why: the reasons that decide it, in words for operators."""

    action: Action
    reasons: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


class Guardrails:
    """The evidence of one canary at one time; forgets nothing while it lasts.

    Nothing is kept but counts: how often each metric fell into each bin, and how much batches of
    requests vary. Verdicts follow from the counts alone, so those of several gateways, or of one
    before and after a restart, are merged by adding. A change of margin or level in the middle,
    after a look at the numbers, would make the promise on errors void: stored evidence is refused
    then.

    Args:
        guardrails: Of distinct names, one of them required at least.
        level: The chance of a false rollback, and that of a false promotion (see ``guardrail``).

    Raises:
        ConfigError: The guardrails do not go together.
    """

    def __init__(self, guardrails: Sequence[Guardrail], level: float) -> None:
        if not 0.0 < level < 1.0:
            raise ConfigError(f"{level!r} is no chance between 0 and 1", key="level")
        names = [g.name if g.limit is None else f"{g.name} limit" for g in guardrails]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"named twice: {', '.join(twice)}", key="guardrails")
        if not any(g.required for g in guardrails):
            fix = "promotion would wait for nothing"
            raise ConfigError("no guardrail is required", key="guardrails", fix=fix)
        self.guardrails = tuple(guardrails)
        self.level = level
        self._required = [g for g in guardrails if g.required]
        self._last_open = self._required[0]
        self._needed_ok = math.log(1.0 / level)
        self._needed_worse = math.log(len(guardrails) / level)
        self._metrics = [METRICS[name] for name in dict.fromkeys(g.metric for g in guardrails)]
        self._shares: dict[tuple[Arm, str], ShareTally] = {}
        self._amounts: dict[tuple[Arm, str], AmountTally] = {}
        for metric in self._metrics:
            for arm in ARMS:
                if metric.kind == "share":
                    self._shares[arm, metric.name] = ShareTally()
                else:
                    self._amounts[arm, metric.name] = AmountTally(self._quantiles(metric.name))
        self._comparisons = {
            g: QuantileComparison(g.quantile, g.bound) for g in guardrails if g.quantile is not None
        }

    def observe(self, outcome: Outcome) -> None:
        """Count one request, in the order that ``cohort`` gives.

        Raises:
            ValueError: A number of it cannot be (a negative time); nothing is counted then.
        """
        found = [(metric, metric.of(outcome)) for metric in self._metrics]
        for metric, value in found:
            most = 1.0 if metric.kind == "share" else math.inf
            if value is not None and not 0.0 <= value <= most:
                raise ValueError(f"{metric.name} is {value!r}")
        for metric, value in found:
            if value is None:
                continue
            if metric.kind == "share":
                self._shares[outcome.arm, metric.name].observe(value)
            else:
                self._amounts[outcome.arm, metric.name].observe(value)

    def extend(self, arm: Arm, metric: str, values: Logs) -> None:
        """Count many values of one metric in their order: for recorded requests.

        Raises:
            ValueError: No guardrail has this metric, or a value cannot be; none is counted then.
        """
        found = self._shares.get((arm, metric)) or self._amounts.get((arm, metric))
        if found is None:
            raise ValueError(f"{metric} of the {arm} is not counted")
        found.extend(values)

    def _quantiles(self, metric: str) -> set[float]:
        return {
            g.quantile for g in self.guardrails if g.metric == metric and g.quantile is not None
        }

    def merge(self, other: Guardrails) -> None:
        """Add what another gateway counted of the same canary.

        Raises:
            ValueError: It has other guardrails.
        """
        if (other.guardrails, other.level) != (self.guardrails, self.level):
            raise ValueError("the evidence of other guardrails cannot be added")
        for key, share in self._shares.items():
            share.merge(other._shares[key])
        for key, amounts in self._amounts.items():
            amounts.merge(other._amounts[key])

    def decide(self) -> Action:
        """Return what to do; takes a millisecond or two, so not for each request."""
        if any(self._is(g, "worse") for g in self.guardrails):
            return "rollback"
        # what was open at the last look is so at most others: nothing else need be asked then
        for guardrail in sorted(self._required, key=self._last_open.__ne__):
            if not self._is(guardrail, "ok"):
                self._last_open = guardrail
                return "wait"
        return "promote"

    def judge(self) -> Judgement:
        """Return what to do with all the numbers; ten milliseconds a guardrail, so for people."""
        verdicts = tuple(self._verdict(g) for g in self.guardrails)
        action = _action([(v.guardrail, v.answer) for v in verdicts])
        if action == "rollback":
            deciding = [v for v in verdicts if v.answer == "worse"]
        elif action == "wait":
            deciding = [v for v in verdicts if v.answer == "open" and v.guardrail.required]
        else:
            deciding = [v for v in verdicts if v.guardrail.required]
        return Judgement(action, tuple(v.reason for v in deciding), verdicts)

    def _answer(self, guardrail: Guardrail) -> Answer:
        if self._is(guardrail, "worse"):
            return "worse"
        return "ok" if self._is(guardrail, "ok") else "open"

    def _is(self, guardrail: Guardrail, answer: Literal["worse", "ok"]) -> bool:
        """Return whether so much is proven."""
        above = (answer == "worse") == guardrail.lower_is_better
        needed = self._needed_worse if answer == "worse" else self._needed_ok
        bound = guardrail.bound
        if guardrail.quantile is None:
            shares = [self._shares[arm, guardrail.metric] for arm in ARMS]
            factors = shares[0].factor(), shares[1].factor()
            if not _enough(guardrail, shares[0].measured, shares[1].measured, factors):
                return False
            judge = mean_above if above else mean_below
            return judge(shares[0].share, shares[1].share, bound, needed, factors)
        amounts = [self._amounts[arm, guardrail.metric] for arm in ARMS]
        factors = amounts[0].factor(guardrail.quantile), amounts[1].factor(guardrail.quantile)
        if not _enough(guardrail, amounts[0].measured, amounts[1].measured, factors):
            return False
        comparison = self._comparisons[guardrail]
        test = comparison.above if above else comparison.below
        return test(amounts[0].values, amounts[1].values, needed, factors)

    def _verdict(self, guardrail: Guardrail) -> Verdict:
        baseline = None if guardrail.limit is not None else self.figure(guardrail, "baseline")
        candidate = self.figure(guardrail, "candidate")
        return verdict(guardrail, self._answer(guardrail), baseline, candidate)

    def figure(self, guardrail: Guardrail, arm: Arm) -> Figure:
        """Return what is known of one arm, with the interval at ``level``."""
        if guardrail.quantile is None:
            return self._shares[arm, guardrail.metric].figure(self.level)
        return self._amounts[arm, guardrail.metric].figure(guardrail.quantile, self.level)

    def distributions(self) -> Mapping[str, tuple[Histogram, Histogram]]:
        """Return the counts of each metric that has quantiles: of the baseline, the candidate."""
        ours, theirs = ARMS
        return {
            metric.name: (
                self._amounts[ours, metric.name].values,
                self._amounts[theirs, metric.name].values,
            )
            for metric in self._metrics
            if metric.kind != "share"
        }

    def as_dict(self) -> dict[str, object]:
        """Return the evidence as plain values, for JSON."""
        return {
            "version": VERSION,
            "level": self.level,
            "guardrails": [asdict(g) for g in self.guardrails],
            **{arm: self._arm(arm) for arm in ARMS},
        }

    def _arm(self, arm: Arm) -> dict[str, object]:
        found: dict[str, object] = {}
        for metric in self._metrics:
            key = (arm, metric.name)
            held = self._shares[key] if metric.kind == "share" else self._amounts[key]
            found[metric.name] = held.as_dict()
        return found

    @staticmethod
    def from_dict(state: object, guardrails: Sequence[Guardrail], level: float) -> Guardrails:
        """Return the evidence of ``as_dict``, for the same guardrails and level.

        Raises:
            DamagedState: It is anything else, or was gathered for others.
            ConfigError: See the class.
        """
        result = Guardrails(guardrails, level)
        plain = known(state, ("version", "level", "guardrails", *ARMS), "the canary's evidence")
        if plain["version"] != VERSION or type(plain["version"]) is not int:
            raise DamagedState(f"its version is {plain['version']!r}, not {VERSION}")
        if number(plain["level"], 0.0, 1.0, "the level") != level:
            raise DamagedState(f"it was gathered at level {plain['level']!r}, not {level!r}")
        if plain["guardrails"] != [asdict(g) for g in guardrails]:
            raise DamagedState("it was gathered for other guardrails")
        for arm in ARMS:
            result._load(arm, plain[arm])
        return result

    def _load(self, arm: Arm, state: object) -> None:
        names = [metric.name for metric in self._metrics]
        plain: Mapping[str, object] = known(state, names, f"the evidence of the {arm}")
        for metric in self._metrics:
            if metric.kind == "share":
                self._shares[arm, metric.name] = ShareTally.from_dict(plain[metric.name])
            else:
                quantiles = self._quantiles(metric.name)
                self._amounts[arm, metric.name] = AmountTally.from_dict(
                    plain[metric.name], quantiles
                )


def _enough(guardrail: Guardrail, baseline: int, candidate: int, factors: Factors) -> bool:
    least = guardrail.min_samples
    enough = candidate >= least * factors[1]
    return enough and (guardrail.limit is not None or baseline >= least * factors[0])


def _action(answers: Sequence[tuple[Guardrail, Answer]]) -> Action:
    if any(answer == "worse" for _, answer in answers):
        return "rollback"
    if all(answer == "ok" for guardrail, answer in answers if guardrail.required):
        return "promote"
    return "wait"
