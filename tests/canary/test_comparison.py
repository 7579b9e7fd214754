"""What is proven of two arms together is proven wherever the baseline's true value lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.canary.comparison import Bound, QuantileComparison, mean_above, mean_below
from disagg_plugins.canary.confidence import Share, quantile_interval, share_interval
from disagg_plugins.canary.evidence import log_above, log_below
from disagg_plugins.canary.histogram import Histogram

NEEDED = math.log(1 / 0.05)

shares = st.integers(1, 3_000).flatmap(lambda n: st.builds(Share, st.just(n), st.integers(0, n)))
ratios = st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0])
offsets = st.sampled_from([-0.2, -0.01, 0.0, 0.01, 0.2])
latencies = st.lists(st.floats(1e-5, 1e5) | st.just(math.inf), min_size=1, max_size=80)


def by_grid(baseline, candidate, bound, above):
    """Return the least evidence over a grid of the baseline's mean: never below the true least."""
    least = math.inf
    for mean in np.linspace(0, 1, 1_001):
        allowed = bound.of(float(mean))
        if (allowed < 0) if above else (allowed > 1):
            continue  # no candidate on the wrong side is possible
        allowed = min(1.0, max(0.0, allowed))
        ours, theirs = (log_below, log_above) if above else (log_above, log_below)
        evidence = ours(baseline.total, baseline.count, float(mean))
        least = min(least, evidence + theirs(candidate.total, candidate.count, allowed))
    return least


@settings(max_examples=60)
@given(shares, shares, ratios, offsets)
def test_means_are_judged_as_a_grid_of_the_baselines_mean_judges(
    baseline, candidate, ratio, offset
):
    bound = Bound(ratio, offset)
    for above, judge in ((True, mean_above), (False, mean_below)):
        least = by_grid(baseline, candidate, bound, above)
        proven = judge(baseline, candidate, bound, NEEDED)
        assert not proven or least >= NEEDED
        if least > NEEDED + 0.5:  # a grid misses the least by a little
            assert proven


@given(shares, shares, ratios, offsets)
def test_a_mean_is_never_proven_to_lie_on_both_sides(baseline, candidate, ratio, offset):
    bound = Bound(ratio, offset)
    if -0.5 < offset < 0.5 and 0 <= bound.of(baseline.total / baseline.count) <= 1:
        assert not (
            mean_above(baseline, candidate, bound, NEEDED)
            and mean_below(baseline, candidate, bound, NEEDED)
        )


@given(shares, st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_a_fixed_limit_needs_the_candidate_alone(candidate, limit):
    low, high = share_interval(candidate, 0.1)  # each side at half of it
    assert mean_above(Share(), candidate, Bound(0.0, limit), NEEDED) == (low > limit)
    assert mean_below(Share(), candidate, Bound(0.0, limit), NEEDED) == (high < limit)


def lowest(values, quantile, bound, other, above):
    """Return the least evidence over all bounds at the values themselves, without any bins."""
    found = []
    for q in sorted({0.0, *values, *(math.nextafter(v, math.inf) for v in values)}):
        allowed = bound.of(q)
        if above:
            ours = log_above(sum(v < q for v in values), len(values), quantile)
            theirs = log_below(sum(v <= allowed for v in other), len(other), quantile)
        else:
            ours = log_below(sum(v <= q for v in values), len(values), quantile)
            theirs = log_above(sum(v < allowed for v in other), len(other), quantile)
        found.append(ours + theirs)
    return min(found)


@settings(max_examples=60)
@given(
    latencies, latencies, st.sampled_from([0.5, 0.9]), ratios, st.sampled_from([-0.1, 0.0, 0.1]),
    st.floats(0.1, 1e3), st.booleans(),
)  # fmt: skip
def test_bins_prove_nothing_that_the_values_do_not(
    first, second, quantile, ratio, offset, apart, up
):
    """Rounded outward: whatever the bins say is proven holds for the exact values."""
    baseline = [v if up else v * apart for v in first]
    candidate = [v * apart if up else v for v in second]
    bound = Bound(ratio, offset)
    comparison = QuantileComparison(quantile, bound)
    arms = Histogram.of(baseline), Histogram.of(candidate)
    for above, judge in ((True, comparison.above), (False, comparison.below)):
        if judge(*arms, 1.0):
            assert lowest(baseline, quantile, bound, candidate, above) >= 1.0


def drawn(seed, count, factor=1.0):
    return Histogram.of(factor * np.random.default_rng(seed).lognormal(0, 0.5, count))


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_a_regression_beyond_the_margin_is_proven_and_one_within_is_refuted(quantile):
    comparison = QuantileComparison(quantile, Bound(1.3, 0.0))
    assert comparison.above(drawn(1, 3_000), drawn(2, 3_000, 1.7), NEEDED)
    assert comparison.below(drawn(1, 3_000), drawn(2, 3_000, 1.0), NEEDED)
    for judge in (comparison.above, comparison.below):
        assert not judge(drawn(1, 3_000), drawn(2, 3_000, 1.3), NEEDED)


def test_a_fixed_limit_on_a_quantile_is_judged_by_its_interval():
    values = drawn(3, 2_000)
    low, high = quantile_interval(values, 0.9, 0.1)
    for limit in (low * 0.98, low * 1.02, high * 0.98, high * 1.02):
        comparison = QuantileComparison(0.9, Bound(0.0, limit))
        assert comparison.above(Histogram(), values, NEEDED) == (limit < low)
        assert comparison.below(Histogram(), values, NEEDED) == (limit > high)


def test_a_limit_that_is_itself_a_value_counts_what_equals_it():
    values = Histogram.of([0.1] * 1_000)
    comparison = QuantileComparison(0.9, Bound(0.0, 0.1))
    assert not comparison.above(Histogram(), values, NEEDED)
    assert not comparison.below(Histogram(), values, NEEDED)


def test_taking_the_arms_together_proves_more_than_two_intervals_that_do_not_touch():
    baseline, candidate = Share(1_000, 100), Share(1_000, 163)
    assert share_interval(baseline, 0.05)[1] > share_interval(candidate, 0.05)[0]
    assert mean_above(baseline, candidate, Bound(1.0, 0.0), NEEDED)


def test_a_p99_that_is_infinite_in_both_arms_is_never_decided():
    broken = Histogram.of([0.1] * 900 + [math.inf] * 100)
    comparison = QuantileComparison(0.99, Bound(1.3, 0.0))
    assert not comparison.above(broken, broken, NEEDED)
    assert not comparison.below(broken, broken, NEEDED)


def test_a_candidate_whose_p99_became_infinite_is_worse():
    sound, broken = Histogram.of([0.1] * 2_000), Histogram.of([0.1] * 1_800 + [math.inf] * 200)
    assert QuantileComparison(0.99, Bound(1.3, 0.0)).above(sound, broken, NEEDED)
