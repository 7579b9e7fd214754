"""Intervals hold at all times at once, are rounded outward, and survive merging and storing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.confidence import (
    MeanSequence,
    QuantileSequence,
    Share,
    quantile_estimate,
    quantile_interval,
    share_interval,
)
from disagg_plugins.canary.evidence import CoinEvidence, log_above, log_below
from disagg_plugins.canary.histogram import EDGES, Histogram
from disagg_plugins.errors import DamagedState

LEVEL = 0.1
RUNS = 300
MOST_MISSED = 0.1 * RUNS + 2 * (RUNS * 0.1 * 0.9) ** 0.5
"""Runs that may miss at a level of 0.1, with the chance that the true rate is just that."""

shares = st.integers(0, 2_000).flatmap(
    lambda n: st.tuples(st.just(n), st.floats(0, n) if n else st.just(0.0))
)
values = st.lists(st.floats(0, math.inf) | st.sampled_from(EDGES), min_size=1, max_size=60)


def looks(most):
    """Return the counts after which somebody looks: each of the first 50, then every 5 %."""
    found = list(range(1, 51))
    while found[-1] < most:
        found.append(min(most, int(found[-1] * 1.05)))
    return found


@pytest.mark.parametrize("mean", [0.01, 0.3, 0.95])
def test_a_proportion_is_covered_at_every_look(mean):
    rng = np.random.default_rng(1)
    needed = math.log(2 / LEVEL)
    totals = np.cumsum(rng.random((RUNS, 2_000)) < mean, axis=1)
    coin = CoinEvidence(mean)
    missed = np.zeros(RUNS, bool)
    for n in looks(2_000):
        # the true mean lies outside where the evidence on one side is enough (see share_interval)
        at = totals[:, n - 1]
        missed |= np.maximum(coin.log_above(at, n), coin.log_below(at, n)) >= needed
    assert missed.sum() <= MOST_MISSED


def test_a_usual_interval_looked_at_as_often_misses_far_more():
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(RUNS):
        totals = np.cumsum(rng.random(2_000) < 0.3)
        missed += any(
            abs(totals[n - 1] / n - 0.3) > 1.645 * (0.21 / n) ** 0.5 for n in looks(2_000)
        )
    assert missed > 3 * MOST_MISSED


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_a_quantile_is_covered_at_every_look(quantile):
    rng = np.random.default_rng(2)
    true = float(np.exp(0.8 * {0.5: 0.0, 0.9: 1.2815516, 0.99: 2.3263479}[quantile]))
    missed = 0
    for _ in range(50):
        sequence = QuantileSequence(quantile, LEVEL)
        drawn = rng.lognormal(0, 0.8, 1_000)
        before = 0
        for n in looks(1_000)[::6]:
            sequence.values.merge(Histogram.of(drawn[before:n]))
            before = n
            low, high = sequence.interval()
            if not low <= true <= high:
                missed += 1
                break
    assert missed <= 0.1 * 50 + 2 * 2.1


def test_bounded_values_that_are_no_coins_are_covered_too():
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(100):
        totals = np.cumsum(rng.beta(0.3, 0.7, 1_000))
        missed += any(
            not low <= 0.3 <= high
            for low, high in (
                share_interval(Share(n, float(totals[n - 1])), LEVEL) for n in looks(1_000)[::6]
            )
        )
    assert missed <= 0.1 * 100 + 2 * 3


@given(shares)
def test_an_interval_holds_the_estimate_and_ends_where_the_evidence_is_enough(share):
    count, total = share
    low, high = share_interval(Share(count, total), LEVEL)
    assert 0.0 <= low <= high <= 1.0
    needed = math.log(2 / LEVEL)
    if count:
        assert low <= total / count * (1 + 1e-12)
        assert high >= total / count * (1 - 1e-12)
    # outward: the bounds themselves are proven, so nothing that is not lies outside
    assert low == 0.0 or log_above(total, count, low) >= needed
    assert high == 1.0 or log_below(total, count, high) >= needed


@given(values, st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_bounds_of_a_quantile_are_rounded_outward(found, quantile):
    """The bins only ever widen what the values themselves would allow."""
    low, high = quantile_interval(Histogram.of(found), quantile, LEVEL)
    needed = math.log(2 / LEVEL)
    count = len(found)
    for value in found:
        below, up_to = sum(v < value for v in found), sum(v <= value for v in found)
        possible = (
            log_above(below, count, quantile) < needed
            and log_below(up_to, count, quantile) < needed
        )
        assert not possible or low <= value <= high


def test_nothing_observed_bounds_nothing():
    assert MeanSequence(LEVEL).interval() == (0.0, 1.0)
    assert QuantileSequence(0.9, LEVEL).interval() == (0.0, math.inf)
    assert Share().estimate() is None
    assert quantile_estimate(Histogram(), 0.5) is None


def test_a_p99_has_no_upper_bound_while_a_hundredth_may_have_failed():
    sequence = QuantileSequence(0.99, LEVEL)
    for i in range(2_000):
        sequence.observe(math.inf if i % 50 == 0 else 0.2)
    low, high = sequence.interval()
    assert (low, high) == (EDGES[-1], math.inf)
    assert quantile_estimate(sequence.values, 0.99) == math.inf
    assert QuantileSequence(0.5, LEVEL, sequence.values).interval()[1] < 0.203


def test_the_estimate_of_a_quantile_lies_in_its_bin():
    found = [0.1 * i for i in range(1, 101)]
    assert quantile_estimate(Histogram.of(found), 0.9) == pytest.approx(9.0, rel=0.01)


def test_more_of_the_same_narrows_the_interval():
    widths = []
    for count in (100, 1_000, 10_000):
        low, high = share_interval(Share(count, count / 10), 0.05)
        widths.append(high - low)
    assert widths[0] > 2.5 * widths[1] > 2.5 * 2.5 * widths[2]


@pytest.mark.parametrize("mean", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("count", [100, 1_000, 10_000, 100_000])
def test_looking_at_any_time_costs_less_than_twice_the_usual_width(mean, count):
    low, high = share_interval(Share(count, mean * count), 0.05)
    z = 1.96
    wilson = z * (mean * (1 - mean) / count + (z / count / 2) ** 2) ** 0.5 / (1 + z * z / count)
    assert high - low < 2 * 2 * wilson


@given(shares, shares)
def test_means_merged_are_as_if_one_had_seen_all(first, second):
    one, other = MeanSequence(LEVEL, Share(*first)), MeanSequence(LEVEL, Share(*second))
    one.merge(other)
    assert one.count == first[0] + second[0]
    assert one.share.total == first[1] + second[1]


@given(values, values)
def test_the_order_of_values_is_nothing_to_a_quantile(first, second):
    one, other = QuantileSequence(0.9, LEVEL), QuantileSequence(0.9, LEVEL)
    both = QuantileSequence(0.9, LEVEL)
    for value in second:
        one.observe(value)
    for value in first:
        other.observe(value)
        both.observe(value)
    for value in second:
        both.observe(value)
    one.merge(other)
    assert one.interval() == both.interval()
    assert one.count == both.count


@given(shares, values)
def test_stored_and_read_they_say_the_same(share, found):
    means = MeanSequence(LEVEL, Share(*share))
    again = MeanSequence.from_dict(json.loads(json.dumps(means.as_dict())))
    assert (again.interval(), again.count) == (means.interval(), means.count)
    quantiles = QuantileSequence(0.9, LEVEL, Histogram.of(found))
    back = QuantileSequence.from_dict(json.loads(json.dumps(quantiles.as_dict())))
    assert (back.interval(), back.count) == (quantiles.interval(), quantiles.count)


def test_a_sum_that_rounding_made_too_large_is_still_read():
    share = Share()
    for _ in range(100_000):
        share.observe(0.1 * 3 + 0.7)
    share.total = math.nextafter(share.count, math.inf)
    assert Share.from_dict(share.as_dict()).total == share.count


@pytest.mark.parametrize(
    "share",
    [
        {"count": 3},
        {"count": -1, "total": 0.0},
        {"count": 2, "total": 2.1},
        {"count": 2, "total": -0.1},
        {"count": 2, "total": math.nan},
        {"count": 2, "total": math.inf},
        {"count": 2, "total": "1"},
        {"count": 2, "total": True},
        {"count": 2.0, "total": 1.0},
        {"count": True, "total": 1.0},
        {"count": 1 << 60, "total": 1.0},
    ],
)
def test_a_damaged_share_is_an_error(share):
    with pytest.raises(DamagedState, match="begin the canary anew"):
        MeanSequence.from_dict({"level": LEVEL, "share": share})


@pytest.mark.parametrize("level", [0, 1, 1.5, -1, None, math.nan])
def test_a_damaged_level_is_an_error(level):
    with pytest.raises(DamagedState):
        MeanSequence.from_dict({"level": level, "share": Share().as_dict()})
    empty = Histogram().as_dict()
    with pytest.raises(DamagedState):
        QuantileSequence.from_dict({"quantile": level, "level": LEVEL, "values": empty})


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_outside_0_and_1_is_an_error(wrong):
    sequence = MeanSequence(LEVEL)
    with pytest.raises(ValueError, match="between 0 and 1"):
        sequence.observe(wrong)
    assert sequence.count == 0


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1.0, math.nan])
def test_a_level_or_quantile_outside_0_and_1_is_an_error(wrong):
    with pytest.raises(ValueError, match="level"):
        MeanSequence(wrong)
    with pytest.raises(ValueError, match="quantile"):
        QuantileSequence(wrong, LEVEL)
