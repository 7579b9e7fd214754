"""Which of the scored workers is taken."""

from __future__ import annotations

from collections import Counter

import pytest

from disagg_plugins.scheduling.power_of_two import PowerOfTwo
from disagg_plugins.scheduling.weighted_random import WeightedRandom

SCORED = {"good": 0.8, "fair": 0.4, "bad": 0.0}


@pytest.mark.parametrize("picker", [PowerOfTwo, WeightedRandom])
def test_equal_seeds_pick_alike_and_a_single_worker_is_picked(picker):
    one, other = picker(7), picker(7)
    picks = [one.disagg_select_worker(SCORED) for _ in range(50)]
    assert picks == [other.disagg_select_worker(SCORED) for _ in range(50)]
    assert one.disagg_select_worker({"only": 0.0}) == "only"
    assert one.disagg_select_worker({}) is None


def test_the_better_of_two_is_never_the_worst_of_all():
    picker = PowerOfTwo(1)
    picks = Counter(picker.disagg_select_worker(SCORED) for _ in range(300))
    assert set(picks) == {"good", "fair"}
    assert picks["good"] > picks["fair"]


def test_twice_the_score_is_about_twice_the_requests():
    picker = WeightedRandom(1)
    picks = Counter(picker.disagg_select_worker(SCORED) for _ in range(3000))
    assert set(picks) == {"good", "fair"}
    assert 1.7 < picks["good"] / picks["fair"] < 2.3


def test_without_any_score_anybody_may_be_picked():
    picker = WeightedRandom(1)
    assert {picker.disagg_select_worker({"a": 0.0, "b": 0.0}) for _ in range(50)} == {"a", "b"}
