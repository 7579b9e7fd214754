"""What the fleets of two arms hold ready, as a factor of their goodput."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_plugins.canary.efficiency import Scale, cost_of, scales
from disagg_plugins.canary.guardrail import Guardrail
from disagg_plugins.canary.guardrails import Guardrails
from disagg_plugins.canary.metrics import Outcome
from disagg_plugins.errors import ConfigError


def fleet(*costs: str | None):
    return [
        SimpleNamespace(name=f"w{i}", labels={} if cost is None else {"cost": cost})
        for i, cost in enumerate(costs)
    ]


def test_the_smaller_fleet_has_the_scale_one() -> None:
    found = scales({"baseline": fleet("2", "2"), "candidate": fleet("1", "1", "1")})
    assert found["baseline"] == (1.0, pytest.approx(0.75))
    assert found["candidate"] == (pytest.approx(2 / 3), 1.0)


def test_one_worker_without_a_cost_leaves_the_cost_unknown_and_the_workers_known() -> None:
    found = scales({"baseline": fleet("2", None), "candidate": fleet("1")})
    assert found == {"baseline": Scale(0.5, None), "candidate": Scale(1.0, None)}


def test_an_arm_without_workers_has_no_scale() -> None:
    found = scales({"baseline": fleet("2"), "candidate": fleet()})
    assert found == {"baseline": Scale(None, None), "candidate": Scale(None, None)}


def test_a_cost_is_a_positive_number() -> None:
    assert cost_of(fleet("2.5")[0]) == 2.5
    with pytest.raises(ConfigError, match="'w0' has the label cost 'two'"):
        cost_of(fleet("two")[0])


@pytest.mark.parametrize(("ratio", "answer"), [(1.0, "rollback"), (0.6, "promote")])
def test_three_workers_that_do_what_two_did_need_a_margin(ratio: float, answer: str) -> None:
    rail = Guardrail(metric="goodput_per_worker", ratio=ratio, min_samples=10)
    guardrails = Guardrails([rail], 0.05)
    for number in range(4_000):
        for arm, per_worker in (("baseline", 1.0), ("candidate", 2 / 3)):
            guardrails.observe(
                Outcome(
                    arm, float(number), "ok", within_slo=number % 50 != 0, per_worker=per_worker
                )
            )
    assert guardrails.decide() == answer
