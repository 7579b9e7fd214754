"""What was counted of one metric of one arm is the same however it came in."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.tally import AmountTally, ShareTally
from disagg_plugins.errors import DamagedState

shares = st.lists(st.floats(0, 1), max_size=100)
amounts = st.lists(st.floats(0, 1e5) | st.just(math.inf), max_size=100)


def amount_tally(values, quantiles=(0.9,)):
    tally = AmountTally(quantiles)
    for value in values:
        tally.observe(value)
    return tally


def share_tally(values):
    tally = ShareTally()
    for value in values:
        tally.observe(value)
    return tally


@given(shares)
def test_shares_one_by_one_and_all_at_once_are_the_same(values):
    once = ShareTally()
    once.extend(np.asarray(values, dtype=np.float64))
    one_by_one = share_tally(values)
    assert (once.count, once.measured) == (one_by_one.count, one_by_one.measured)
    assert once.share.total == pytest.approx(one_by_one.share.total)


@given(amounts)
def test_amounts_one_by_one_and_all_at_once_are_the_same(values):
    once = AmountTally((0.9,))
    once.extend(np.asarray(values, dtype=np.float64))
    assert once.values.as_dict() == amount_tally(values).values.as_dict()


def test_of_many_at_once_most_are_watched():
    tally = AmountTally((0.99,))
    tally.extend(np.linspace(0.1, 1.0, 10_000))
    assert tally.measured >= 9_900


def test_a_series_is_watched_once_its_place_is_known():
    tally = amount_tally([1.0, 2.0] * 20)
    assert tally.measured == 0
    tally.observe(1.0)
    assert tally.measured == 1


def test_the_factor_of_a_quantile_is_at_least_that_of_the_median():
    rng = np.random.default_rng(1)
    tally = AmountTally((0.99,))
    busy = np.repeat(rng.random(200) < 0.5, 50)  # fifty requests in a row share one queue
    values = np.where(busy, 2.0, 1.0) * rng.lognormal(0, 0.1, 10_000)
    for part in np.split(values, 100):
        tally.extend(part)
    assert 10 < tally.factor(0.5) <= tally.factor(0.99) < 120
    wide, narrow = tally.figure(0.99, 0.05), AmountTally((0.99,))
    for part in np.split(rng.permutation(values), 100):
        narrow.extend(part)
    assert narrow.figure(0.99, 0.05).high < wide.high


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_an_impossible_value_counts_nothing(wrong):
    amount, share = AmountTally((0.9,)), ShareTally()
    for tally in (amount, share):
        with pytest.raises(ValueError, match="value"):
            tally.extend(np.array([0.5, wrong]))
        with pytest.raises(ValueError, match=str(wrong)):
            tally.observe(wrong)
        assert tally.count == 0


@given(shares, amounts)
def test_stored_and_read_they_say_the_same_and_go_on(share_values, amount_values):
    share, amount = share_tally(share_values), amount_tally(amount_values)
    share_again = ShareTally.from_dict(json.loads(json.dumps(share.as_dict())))
    plain = json.loads(json.dumps(amount.as_dict(), allow_nan=False))
    amount_again = AmountTally.from_dict(plain, (0.9,))
    assert share_again.figure(0.05) == share.figure(0.05)
    assert amount_again.figure(0.9, 0.05) == amount.figure(0.9, 0.05)
    for _ in range(3):
        amount_again.observe(1.0)
    assert amount_again.count == amount.count + 3


def test_a_place_that_no_request_reached_is_stored_too():
    tally = amount_tally([math.inf] * 50)
    assert tally.measured == 10
    again = AmountTally.from_dict(json.loads(json.dumps(tally.as_dict(), allow_nan=False)), (0.9,))
    again.observe(math.inf)
    assert again.measured == 11


def change(state, key, to):
    return state | {"watched": [state["watched"][0] | {key: to}, state["watched"][1]]}


@pytest.mark.parametrize(
    ("key", "to"),
    [("quantile", 0.4), ("quantile", None), ("place", -1), ("place", "x"), ("place", math.nan),
     ("dependence", None), ("more", 1)],
)  # fmt: skip
def test_a_damaged_state_is_an_error(key, to):
    state = amount_tally([1.0] * 50).as_dict()
    with pytest.raises(DamagedState):
        AmountTally.from_dict(change(state, key, to), (0.9,))


def test_a_state_of_other_quantiles_is_an_error():
    state = amount_tally([1.0]).as_dict()
    for quantiles in ((0.99,), (0.9, 0.99), ()):
        with pytest.raises(DamagedState):
            AmountTally.from_dict(state, quantiles)
    with pytest.raises(DamagedState):
        AmountTally.from_dict(state | {"watched": None}, (0.9,))
    with pytest.raises(DamagedState):
        ShareTally.from_dict(state)
