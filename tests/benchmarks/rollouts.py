"""Simulated canary rollouts: two arms, looked at again and again until a verdict (pure).

Latencies are log-normal with a heavy tail, as serving has them: one prompt in ten is long, one
answer in thirty is held up by others. Each metric is drawn by itself, so a regression can be
planted in one and not the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.guardrail import Guardrail
from disagg_plugins.canary.guardrails import Guardrails
from disagg_plugins.canary.metrics import ARMS

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

ERRORS = 0.01
GOOD = 0.9
"""Share of requests within their SLO in a healthy arm."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with the candidate: factors of latencies and of goodput, errors added."""

    factors: Mapping[str, float] = field(default_factory=dict)
    errors: float = 0.0
    # Share of the last request's state that the next one inherits: queues are such a memory.
    memory: float = 0.0


HEALTHY = Fault()

LEAST = 100
"""Requests before a verdict."""


def normal(rng: np.random.Generator, count: int, memory: float) -> Values:
    """Return standard normal draws; with memory, a stationary chain of them."""
    noise = rng.standard_normal(count)
    if memory:
        scale = (1.0 - memory * memory) ** 0.5
        for i in range(1, count):
            noise[i] = memory * noise[i - 1] + scale * noise[i]
    return noise


def latency(
    rng: np.random.Generator, count: int, fault: Fault, shape: tuple[float, float, float, float]
) -> Values:
    """Return latencies; shape: median and log-spread, share of the tail, its factor."""
    median, spread, tail, factor = shape
    values = median * np.exp(spread * normal(rng, count, fault.memory))
    return np.where(rng.random(count) < tail, factor * values, values)


SHAPES = {
    "ttft": (0.25, 0.6, 0.1, 4.0),
    "tpot": (0.025, 0.3, 0.03, 4.0),
    "e2e": (4.0, 0.9, 0.03, 2.0),
}


def draw(rng: np.random.Generator, count: int, fault: Fault) -> dict[str, Values]:
    """Return every metric of ``count`` requests of an arm."""
    failed = rng.random(count) < ERRORS + fault.errors
    found = {"error_rate": failed.astype(np.float64)}
    for name, shape in SHAPES.items():
        values = latency(rng, count, fault, shape) * fault.factors.get(name, 1.0)
        found[name] = np.where(failed & (rng.random(count) < 0.5), np.inf, values)
    good = GOOD * fault.factors.get("goodput", 1.0)
    found["goodput"] = (rng.random(count) < good).astype(np.float64)
    return found


def looks(most: int) -> list[int]:
    """Return after how many requests of each arm somebody looks: every 10, later every 4 %."""
    found = [10]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(10, found[-1] // 25)))
    return found


@dataclass(frozen=True, slots=True)
class End:
    """How a rollout ended, and after how many requests of each arm."""

    action: str
    samples: int
    z_test_rolls_back: bool


def rollout(
    rng: np.random.Generator, guardrails: Sequence[Guardrail], level: float, most: int, fault: Fault
) -> End:
    """Run one rollout with equal traffic until it is decided, or ``most`` requests each."""
    seen = Guardrails(guardrails, level)
    healthy = Fault(memory=fault.memory)
    drawn = {arm: draw(rng, most, f) for arm, f in zip(ARMS, (healthy, fault), strict=True)}
    names = {g.metric for g in guardrails}
    before, action, fooled = 0, "wait", False
    for now in looks(most):
        for arm in ARMS:
            for name in names:
                seen.extend(arm, name, drawn[arm][name][before:now])
        errors = [float(drawn[arm]["error_rate"][:now].sum()) for arm in ARMS]
        fooled = fooled or (now >= 100 and z_value(errors, now) > 1.645)
        action, before = seen.decide(), now
        if action != "wait":
            break
    return End(action, before, fooled)


def z_value(totals: Sequence[float], count: int) -> float:
    """Return the z of the usual test whether the second share is greater, counts being equal."""
    mean = sum(totals) / (2 * count)
    spread = (2 * mean * (1 - mean) / count) ** 0.5
    return (totals[1] - totals[0]) / count / spread if spread else 0.0


def guarded(margin: float, required: str | None = None) -> list[Guardrail]:
    """Return guardrails on every metric; ``margin`` 1.1 gives 10 % of a latency, 1.0 nothing.

    Args:
        margin: Of latencies; the other margins go with it.
        required: The only required guardrail; None: all are.
    """
    given = (margin - 1.0) * 10.0
    rails: list[Guardrail] = []
    for name in SHAPES:
        rails.append(
            Guardrail(
                metric=name,
                quantile=0.5,
                ratio=margin,
                required=required in (None, name),
                min_samples=LEAST,
            )
        )
    rails += [
        Guardrail(
            metric="goodput",
            ratio=1.0 - 0.05 * given,
            required=required in (None, "goodput"),
            min_samples=LEAST,
        ),
        Guardrail(
            metric="error_rate",
            slack=0.01 * given,
            required=required in (None, "error_rate"),
            min_samples=LEAST,
        ),
        # the tail has few requests, so it needs the wider margin to be decided as soon
        Guardrail(
            metric="ttft",
            quantile=0.99,
            ratio=1 + 3 * (margin - 1),
            required=False,
            min_samples=LEAST,
        ),
    ]
    return rails
