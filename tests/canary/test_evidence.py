"""Evidence against a supposed mean: never more than chance gives where the mean is true."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.evidence import LOG_STAKES, CoinEvidence, log_above, log_below

counts = st.integers(0, 5_000)
means = st.floats(0.001, 0.999)


def test_all_stakes_together_are_one():
    assert math.fsum(math.exp(stake) for stake in LOG_STAKES) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("mean", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("log_evidence", [log_above, log_below])
def test_evidence_against_the_true_mean_is_one_on_average(mean, log_evidence):
    """Exactly, over all series of six coins: the definition of a test martingale."""
    average = math.fsum(
        mean ** sum(coins)
        * (1 - mean) ** (6 - sum(coins))
        * math.exp(log_evidence(sum(coins), 6, mean))
        for coins in product((0, 1), repeat=6)
    )
    assert average == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=6))
def test_values_between_0_and_1_give_no_more_evidence_than_coins(values):
    """One value of any distribution with that mean raises the expected evidence by nothing."""
    weights = [w for _, w in values]
    total = sum(weights)
    mean = sum(v * w for v, w in values) / total
    for log_evidence in (log_above, log_below):
        average = sum(math.exp(log_evidence(v, 1, mean)) * w for v, w in values) / total
        assert average <= 1.0 + 1e-9


@given(counts, counts, means, means)
def test_evidence_moves_one_way_with_total_and_with_mean(a, b, one, other):
    count = a + b
    low, high = min(one, other), max(one, other)
    assert log_above(a, count, low) >= log_above(a, count, high) - 1e-9
    assert log_below(a, count, low) <= log_below(a, count, high) + 1e-9
    if a:
        assert log_above(a, count, low) >= log_above(a - 1, count, low)
        assert log_below(a, count, low) <= log_below(a - 1, count, low)


@given(counts, counts, means, means)
def test_evidence_is_convex_in_the_mean(a, b, one, other):
    middle = (one + other) / 2
    for log_evidence in (log_above, log_below):
        ends = log_evidence(a, a + b, one) + log_evidence(a, a + b, other)
        assert 2 * log_evidence(a, a + b, middle) <= ends + 1e-6


@given(st.lists(st.integers(0, 3_000), min_size=1, max_size=5), means)
def test_many_counts_at_once_have_the_same_evidence(totals, mean):
    coin = CoinEvidence(mean)
    above = coin.log_above(np.array(totals), 3_000)
    below = coin.log_below(np.array(totals), 3_000)
    assert above == pytest.approx([log_above(t, 3_000, mean) for t in totals])
    assert below == pytest.approx([log_below(t, 3_000, mean) for t in totals])
