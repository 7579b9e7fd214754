"""What the candidate may not do, and what the evidence says of it so far (pure).

A guardrail compares one statistic of one metric with what the baseline has, or with a fixed limit.
Splitting usually gives TTFT for TPOT, so each has a margin of its own. Its verdict is

- ``worse``: proven worse than the margin allows;
- ``ok``: proven no worse than that (non-inferior); with a ratio below 1, proven better;
- ``open``: neither yet. Exactly on the margin it stays so for ever.

Verdicts hold however often one looks (``comparison``). Over all looks and all guardrails,

- a candidate that is nowhere worse than allowed is rolled back with a chance of at most ``level``:
  each of m guardrails is judged at level / m (union bound);
- one that is worse than allowed anywhere that is required is promoted with a chance of at most
  ``level``: *all* must be ok, the bad one too, so each may be judged at the full level (Berger,
  "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24(4), 1982).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from disagg_plugins.canary.comparison import Bound
from disagg_plugins.canary.metrics import METRICS, Metric, metric_named
from disagg_plugins.errors import ConfigError

Answer = Literal["worse", "ok", "open"]

NOTABLE = 1.1
"""A factor up to this is not worth telling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrail:
    """One declared guardrail.

    Args:
        metric: A name of ``metrics.METRICS``.
        quantile: 0.99 is the p99; None for shares, of which the mean is taken.
        ratio: What may be had of the baseline's: 1.3 gives 30 % where lower is better, 0.9 demands
            10 % less.
        slack: What may be given besides, in the metric's unit; negative demands.
        limit: A fixed limit in place of the baseline: neither ratio nor slack go with it.
        better: Which way is good; None: the metric's own.
        required: Whether promotion waits for its ``ok``; ``worse`` rolls back in any case.
        min_samples: Least requests of each arm before any verdict, in what they are worth as
            independent ones: of few nobody can tell how much they depend on each other, and the
            first may meet an engine that still compiles. A latency is watched from its first 40
            requests on.

    Raises:
        ConfigError: These do not go together.
    """

    metric: str
    quantile: float | None = None
    ratio: float = 1.0
    slack: float = 0.0
    limit: float | None = None
    better: Literal["lower", "higher"] | None = None
    required: bool = True
    min_samples: int = 1

    def __post_init__(self) -> None:
        metric = metric_named(self.metric, key="metric")
        if (metric.kind == "amount") != (self.quantile is not None):
            fix = "name a quantile, as 0.99" if self.quantile is None else "it has a mean only"
            raise ConfigError(f"{self.metric} is a {metric.kind}", key="quantile", fix=fix)
        if self.quantile is not None and not 0.0 < self.quantile < 1.0:
            raise ConfigError(f"{self.quantile!r} is no quantile between 0 and 1", key="quantile")
        if not 0.0 < self.ratio < math.inf:
            raise ConfigError(f"{self.ratio!r} is no positive number", key="ratio")
        if not math.isfinite(self.slack):
            raise ConfigError(f"{self.slack!r} is not finite", key="slack")
        if self.limit is not None:
            if not 0.0 <= self.limit < math.inf:
                raise ConfigError(f"{self.limit!r} is no number of at least 0", key="limit")
            if (self.ratio, self.slack) != (1.0, 0.0):
                fix = "a fixed limit has no margin against the baseline"
                raise ConfigError("it stands beside ratio or slack", key="limit", fix=fix)
        if self.min_samples < 1:
            raise ConfigError(f"{self.min_samples!r} is less than 1", key="min_samples")
        if self.better is None and metric.better is None:
            fix = "say lower or higher"
            raise ConfigError(f"{self.metric} has no better side", key="better", fix=fix)

    @property
    def name(self) -> str:
        """The metric and its statistic, in short: ``ttft p99``."""
        if self.quantile is None:
            return self.metric
        return f"{self.metric} p{100 * self.quantile:.10g}"

    @property
    def declared(self) -> Metric:
        """The metric."""
        return METRICS[self.metric]

    @property
    def lower_is_better(self) -> bool:
        """Whether "worse" means higher."""
        return (self.better or self.declared.better) == "lower"

    @property
    def bound(self) -> Bound:
        """What the candidate may have."""
        if self.limit is not None:
            return Bound(0.0, self.limit)
        return Bound(self.ratio, self.slack if self.lower_is_better else -self.slack)

    @property
    def allowed(self) -> str:
        """What the candidate may have, in words."""
        side = "at most" if self.lower_is_better else "at least"
        unit = f" {self.declared.unit}" if self.declared.unit else ""
        if self.limit is not None:
            return f"{side} {self.limit:g}{unit}"
        times = "" if self.ratio == 1.0 else f"{self.ratio:g} x "
        offset = self.bound.offset
        more = f" {'+' if offset > 0 else '-'} {abs(offset):g}{unit}" if offset else ""
        return f"{side} {times}the baseline's{more}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What is known of one arm: the interval holds at any time (see ``confidence``).

    Attributes:
        factor: How many of its requests are worth one independent one (see ``dependence``).
        measured: How many requests the factor was measured on.
    """

    count: int
    estimate: float | None
    low: float
    high: float
    factor: float = 1.0
    measured: int = 0

    @property
    def worth(self) -> float:
        """How many independent requests its requests are worth."""
        return self.count / self.factor

    def words(self, unit: str) -> str:
        """Return it as ``1.2 s (1.1 to 1.4, 300 requests)``."""
        if self.estimate is None:
            return "no request"
        after = f" {unit}" if unit else ""
        requests = "request" if self.count == 1 else "requests"
        if self.factor > NOTABLE:
            requests += f" worth {self.worth:.0f} independent ones"
        interval = f"{amount(self.low)} to {amount(self.high)}"
        return f"{amount(self.estimate)}{after} ({interval}, {self.count} {requests})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the evidence says of one guardrail, and the numbers that made it.

    Attributes:
        baseline: None for a fixed limit.
        allowed: The bound at the baseline's estimate; None while there is none.
        reason: All of it in words for operators.
    """

    guardrail: Guardrail
    answer: Answer
    baseline: Figure | None
    candidate: Figure
    allowed: float | None
    reason: str


def verdict(
    guardrail: Guardrail, answer: Answer, baseline: Figure | None, candidate: Figure
) -> Verdict:
    """Return the verdict with its reason."""
    unit = guardrail.declared.unit
    said = {
        "worse": "worse than allowed",
        "ok": "within what is allowed",
        "open": "not decided",
    }[answer]
    parts = [f"{guardrail.name} is {said}: {candidate.words(unit)}"]
    if baseline is not None:
        parts.append(f"baseline {baseline.words(unit)}")
    parts.append(f"allowed {guardrail.allowed}")
    allowed: float | None = guardrail.limit
    if baseline is not None and baseline.estimate is not None:
        allowed = max(0.0, guardrail.bound.of(baseline.estimate))
        parts[-1] += f", about {amount(allowed)}{f' {unit}' if unit else ''}"
    if answer == "open":
        parts += _lacking(guardrail, baseline, candidate)
    return Verdict(guardrail, answer, baseline, candidate, allowed, "; ".join(parts))


def _lacking(guardrail: Guardrail, baseline: Figure | None, candidate: Figure) -> list[str]:
    """Say what keeps a verdict open besides chance."""
    found = []
    for arm, figure in (("baseline", baseline), ("candidate", candidate)):
        if figure is None:
            continue
        if figure.measured / figure.factor < guardrail.min_samples:
            least, worth = guardrail.min_samples, figure.measured / figure.factor
            found.append(f"the {arm} has {worth:.0f} of {least} independent requests needed")
        if figure.estimate is not None and math.isinf(figure.estimate):
            share = 1.0 - (guardrail.quantile or 0.0)
            found.append(f"more than {share:.3g} of the {arm}'s requests have no such time")
    return found


def amount(value: float) -> str:
    """Return a number in four digits; +inf as a word."""
    return "unbounded" if math.isinf(value) else f"{value:.4g}"
