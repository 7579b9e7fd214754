"""What was stored is read within bounds, or not at all."""

from __future__ import annotations

import math

import pytest

from disagg_plugins.canary.state import MOST, integer, integers, known, number
from disagg_plugins.errors import DamagedState


def test_a_mapping_has_exactly_the_keys_expected():
    assert known({"a": 1, "b": 2}, ("a", "b"), "it") == {"a": 1, "b": 2}
    for wrong in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, [], None, "ab", {1: 2, "a": 1}):
        with pytest.raises(DamagedState, match=r"^it "):
            known(wrong, ("a", "b"), "it")


@pytest.mark.parametrize("wrong", [-1, 11, 1.0, True, "1", None, math.nan])
def test_an_integer_lies_within_its_bounds(wrong):
    assert [integer(value, 0, 10, "it") for value in (0, 10)] == [0, 10]
    with pytest.raises(DamagedState, match=r"^it is"):
        integer(wrong, 0, 10, "it")


def test_counts_have_a_bound_below_which_floats_are_exact():
    assert integer(MOST, 0, None, "it") == MOST
    with pytest.raises(DamagedState):
        integer(MOST + 1, 0, None, "it")
    with pytest.raises(DamagedState, match="the sum"):
        integers([MOST, 1], 0, None, "it")


def test_a_list_is_a_list():
    assert integers([1, 2], 0, 2, "it") == [1, 2]
    for wrong in ((1, 2), "12", {1: 2}, [1, 3], [1, None]):
        with pytest.raises(DamagedState):
            integers(wrong, 0, 2, "it")


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf, True, "1", None])
def test_a_number_is_finite_and_within_its_bounds(wrong):
    assert number(1, 0.0, 1.0, "it") == 1.0
    with pytest.raises(DamagedState, match=r"^it is"):
        number(wrong, 0.0, 1.0, "it")
