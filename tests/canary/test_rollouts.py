"""Whole rollouts with fixed seeds, looked at again and again: a small ``make bench`` of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.rollouts import HEALTHY, Fault, guarded, looks, rollout

LEVEL = 0.05


def ends(runs, most, fault, guardrails):
    found = []
    for seed in range(runs):
        found.append(rollout(np.random.default_rng(seed), guardrails, LEVEL, most, fault))
    return found


def share(found, action):
    return sum(end.action == action for end in found) / len(found)


def test_identical_arms_are_rarely_rolled_back_even_with_no_margin():
    found = ends(40, 1_500, HEALTHY, guarded(1.0))
    assert share(found, "rollback") <= LEVEL
    assert share(found, "promote") == 0.0


def test_identical_arms_are_promoted_where_margins_allow():
    assert share(ends(6, 8_000, HEALTHY, guarded(1.2)), "promote") == 1.0


def test_arms_whose_requests_depend_on_each_other_are_rarely_rolled_back():
    found = ends(30, 1_000, Fault(memory=0.9), guarded(1.0))
    assert share(found, "rollback") <= 2 * LEVEL


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ttft", Fault({"ttft": 1.1})),
        ("tpot", Fault({"tpot": 1.1})),
        ("goodput", Fault({"goodput": 0.95})),
        ("error_rate", Fault(errors=0.01)),
    ],
)
def test_a_candidate_on_the_margin_is_rarely_promoted(name, fault):
    # alone: others could roll back before it has its chance to err
    alone = [g for g in guarded(1.1, name) if g.required]
    assert share(ends(20, 1_500, fault, alone), "promote") <= LEVEL


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        (Fault({"ttft": 1.2}), 4_000),
        (Fault({"tpot": 1.2}), 1_500),
        (Fault({"e2e": 1.2}), 6_000),
        (Fault({"goodput": 0.8}), 1_000),
        (Fault(errors=0.04), 2_000),
    ],
)
def test_a_regression_is_rolled_back(fault, most):
    assert share(ends(6, most, fault, guarded(1.0)), "rollback") == 1.0


def test_looks_grow_sparser():
    found = looks(1_000)
    assert (found[:3], found[-1]) == ([10, 20, 30], 1_000)
