"""What each scorer counts where the policy does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.policy import SchedulerPolicy

DEFAULT_WEIGHTS = {
    "least-loaded": 1.0,
    "prefix-affinity": 0.0,
    "outstanding-tokens": 0.0,
    "kv-room": 0.0,
    "transfer-cost": 0.0,
    "session-affinity": 0.0,
    "predicted-time": 0.0,
}
"""Weights of the built-in scorers; a scorer of another package weighs 1."""

SLO_WEIGHTS = {"least-loaded": 0.1, "predicted-time": 1.0}
"""With the rule ``slo``: it predicts with the worker that this scorer prefers. The load decides
until something is measured, and between equals."""


def weights_of(rules: SchedulerPolicy) -> dict[str, float]:
    """Return the weights of all built-in scorers, and those that the policy names."""
    more = SLO_WEIGHTS if rules.split.rule == "slo" else {}
    return {**DEFAULT_WEIGHTS, **more, **rules.weights}
