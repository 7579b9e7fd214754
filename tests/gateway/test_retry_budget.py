"""A fleet that fails as a whole is not asked twice for everything."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.gateway.retry_budget import WINDOW_S, RetryBudget


def test_a_quiet_gateway_may_retry_at_its_floor() -> None:
    budget = RetryBudget(share=0.2, floor_per_s=1.0)
    assert [budget.take(0.0) for _ in range(12)] == [True] * 10 + [False] * 2


def test_requests_add_their_share() -> None:
    budget = RetryBudget(share=0.2, floor_per_s=0.0)
    assert not budget.take(0.0)
    for _ in range(50):
        budget.request(0.0)
    assert [budget.take(0.0) for _ in range(11)] == [True] * 10 + [False]


def test_what_was_used_is_forgotten_with_time() -> None:
    budget = RetryBudget(share=0.0, floor_per_s=0.15)
    assert budget.take(0.0)
    assert not budget.take(0.0)
    assert budget.take(20 * WINDOW_S)


def test_a_clock_that_stands_or_goes_back_does_no_harm() -> None:
    budget = RetryBudget(share=0.0, floor_per_s=0.1)
    assert budget.take(100.0)
    assert not budget.take(50.0)
    assert not budget.take(50.0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.floats(0.0, 1.0), st.floats(0.001, 0.1))
def test_when_every_request_fails_retries_stay_a_share(
    count: int, share: float, gap_s: float
) -> None:
    budget, taken = RetryBudget(share, floor_per_s=0.5), 0
    for number in range(count):
        budget.request(number * gap_s)
        taken += budget.take(number * gap_s)
    assert taken <= 0.5 * (WINDOW_S + count * gap_s) + share * count + 1
