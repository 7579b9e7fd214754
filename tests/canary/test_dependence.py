"""Requests that share one fate are found out, independent ones pay nearly nothing for it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.dependence import LEVELS, Dependence
from disagg_plugins.errors import DamagedState

series = st.lists(st.floats(0, 1), max_size=200)


def measured(values):
    dependence = Dependence()
    dependence.extend(np.asarray(values, dtype=np.float64))
    return dependence


def chain(rng, count, memory):
    """Return coins of a chain that keeps its last face with probability ``memory``."""
    fresh = rng.random(count) < 0.3
    keep = rng.random(count) < memory
    keep[0] = False
    last = np.maximum.accumulate(np.where(keep, 0, np.arange(count)))
    return fresh[last].astype(np.float64)


@pytest.mark.parametrize("count", [50, 500, 5_000, 50_000])
def test_independent_requests_are_worth_what_they_are(count):
    rng = np.random.default_rng(1)
    factors = [measured(rng.random(count) < 0.3).factor() for _ in range(50)]
    assert np.mean(factors) < 1.3


@pytest.mark.parametrize("memory", [0.5, 0.8, 0.95])
def test_a_chain_is_worth_what_its_autocorrelation_leaves(memory):
    rng = np.random.default_rng(2)
    true = (1 + memory) / (1 - memory)
    factors = [measured(chain(rng, 20_000, memory)).factor() for _ in range(10)]
    assert np.mean(factors) == pytest.approx(true, rel=0.4)
    assert min(factors) > 0.7 * true


def test_values_that_never_change_tell_nothing():
    assert Dependence().factor() == 1.0
    assert measured([0.0] * 1_000).factor() == 1.0
    assert measured([1.0] * 1_000).factor() == 1.0


@given(series, st.lists(st.integers(0, 200), max_size=4))
def test_it_is_the_same_in_one_piece_in_many_and_one_by_one(values, cuts):
    whole, parts, single = measured(values), Dependence(), Dependence()
    places = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]
    for start, end in zip(places, places[1:], strict=False):
        parts.extend(np.asarray(values[start:end], dtype=np.float64))
    for value in values:
        single.observe(value)
    assert whole.batches == parts.batches == single.batches
    assert whole.count == len(values)
    for level in range(LEVELS):
        for other in (parts, single):
            assert other.totals[level] == pytest.approx(whole.totals[level])
            assert other.squares[level] == pytest.approx(whole.squares[level])


def test_merged_series_have_the_mean_of_their_factors_though_their_means_differ():
    rng = np.random.default_rng(3)
    one, other = measured(rng.random(4_000) < 0.1), measured(chain(rng, 4_000, 0.8))
    factors = one.factor(), other.factor()
    one.merge(other)
    assert one.factor() == pytest.approx(sum(factors) / 2)
    assert one.count == 8_000


@given(series, series)
def test_stored_and_read_it_has_the_same_factor(values, merged):
    dependence = measured(values)
    dependence.merge(measured(merged))
    again = Dependence.from_dict(json.loads(json.dumps(dependence.as_dict())))
    assert again.as_dict() == dependence.as_dict()
    assert (again.factor(), again.count) == (dependence.factor(), dependence.count)


@pytest.mark.parametrize(
    ("key", "to"),
    [
        ("batches", [1]),
        ("batches", None),
        ("batches", [-1] * LEVELS),
        ("totals", [11.0] * LEVELS),
        ("totals", [-1.0] * LEVELS),
        ("squares", [math.nan] * LEVELS),
        ("squares", ["1"] * LEVELS),
        ("merged", -1),
        ("merged_worth", 1.0),
        ("more", 1),
    ],
)
def test_a_damaged_state_is_an_error(key, to):
    state = measured([0.0, 1.0] * 5).as_dict() | {key: to}
    with pytest.raises(DamagedState):
        Dependence.from_dict(state)
