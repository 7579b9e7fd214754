"""Bins are counted exactly at their edges, and adding histograms loses nothing."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.histogram import EDGES, LOWER, NUM_BINS, UPPER, Histogram
from disagg_plugins.errors import DamagedState

values = st.floats(0, math.inf) | st.sampled_from(EDGES)


def test_bins_are_one_percent_wide_from_a_tenth_of_a_millisecond_to_ten_thousand_seconds():
    assert (EDGES[0], EDGES[-1]) == (1e-4, 1e4)
    ratios = [b / a for a, b in zip(EDGES, EDGES[1:], strict=False)]
    assert 1.0099 < min(ratios) <= max(ratios) < 1.0101


@given(st.lists(values))
def test_counts_below_an_edge_are_exact(found):
    histogram = Histogram.of(found)
    below = histogram.below()
    for bin_ in range(0, NUM_BINS, 37):
        assert below[bin_] == sum(value < LOWER[bin_] for value in found)
    assert below[NUM_BINS] == histogram.count == len(found)


@pytest.mark.parametrize("bin_", [0, 1, 928, NUM_BINS - 2, NUM_BINS - 1])
def test_a_bin_holds_its_lower_edge_and_not_its_upper(bin_):
    histogram = Histogram.of([LOWER[bin_], math.nextafter(UPPER[bin_], 0)])
    assert histogram.counts[bin_] == 2


def test_infinity_is_a_value():
    histogram = Histogram()
    histogram.observe(math.inf)
    assert (histogram.count, histogram.counts[-1]) == (1, 1)


@pytest.mark.parametrize("wrong", [-1e-9, math.nan, -math.inf])
def test_a_negative_time_is_an_error(wrong):
    histogram = Histogram()
    with pytest.raises(ValueError, match="at least 0"):
        histogram.observe(wrong)
    with pytest.raises(ValueError, match="at least 0"):
        Histogram.of([1.0, wrong])
    assert histogram.count == 0


@given(st.lists(values), st.lists(values))
def test_merged_is_as_if_one_had_seen_all(first, second):
    one, other, both = Histogram(), Histogram.of(second), Histogram.of(first + second)
    for value in first:
        one.observe(value)
    one.below()  # what was asked before must not stay
    one.merge(other)
    assert one.as_dict() == both.as_dict()
    assert one.count == both.count
    assert (one.below() == both.below()).all()


@given(st.lists(values))
def test_stored_and_read_it_is_the_same(found):
    histogram = Histogram.of(found)
    again = Histogram.from_dict(json.loads(json.dumps(histogram.as_dict())))
    assert (again.counts == histogram.counts).all()
    assert again.count == histogram.count
    again.observe(1.0)
    assert again.below()[-1] == len(found) + 1


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        {"bins": [1], "counts": [1], "more": 1},
        {"bins": [1], "counts": []},
        {"bins": [2, 1], "counts": [1, 1]},
        {"bins": [1, 1], "counts": [1, 1]},
        {"bins": [-1], "counts": [1]},
        {"bins": [NUM_BINS], "counts": [1]},
        {"bins": [1], "counts": [0]},
        {"bins": [1], "counts": [-3]},
        {"bins": [1], "counts": [1.0]},
        {"bins": [1], "counts": [True]},
        {"bins": [1], "counts": [1 << 54]},
        {"bins": [1, 2], "counts": [1 << 53, 1 << 53]},
        {"bins": "12", "counts": [1]},
    ],
)
def test_a_damaged_state_is_an_error(damaged):
    with pytest.raises(DamagedState):
        Histogram.from_dict(damaged)
