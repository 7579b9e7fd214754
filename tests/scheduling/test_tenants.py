"""What a tenant may have at once and over time, and when to come again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.policy import TenantPolicy
from disagg_plugins.scheduling import tenants as module
from disagg_plugins.scheduling.tenants import RETRY_REQUESTS_S, Tenants

START_S = 1000.0


def tenants(**rules):
    named = {("*" if k == "anybody" else k): TenantPolicy(**v) for k, v in rules.items()}
    return Tenants(named)


def test_without_rules_nothing_is_refused_and_nothing_kept():
    book = Tenants({})
    assert all(book.enter(f"t{n}", 10**9, START_S) is None for n in range(10))
    assert len(book) == 0
    book.leave("t1")


@pytest.mark.parametrize(
    ("rule", "sent", "then", "after_s", "retry_s"),
    [
        ({"max_requests": 1}, [10], 10, 0.0, RETRY_REQUESTS_S),
        ({"max_requests": 2}, [10], 10, 0.0, None),
        ({"prompt_tokens_per_s": 100}, [1000], 50, 0.0, 0.5),
        ({"prompt_tokens_per_s": 100}, [1000], 50, 0.4, 0.1),
        ({"prompt_tokens_per_s": 100}, [1000], 50, 0.5, None),
        ({"prompt_tokens_per_s": 100, "burst_tokens": 200}, [150], 60, 0.0, 0.1),
        ({"prompt_tokens_per_s": 100, "burst_tokens": 200}, [150], 50, 0.0, None),
        # larger than the bucket: admitted when it is full, and paid for afterwards
        ({"prompt_tokens_per_s": 100, "burst_tokens": 200}, [1000], 1, 0.0, 8.01),
        ({"prompt_tokens_per_s": 100, "burst_tokens": 200}, [10], 1000, 0.0, 0.1),
    ],
)
def test_what_is_over_a_limit_gets_429_and_when_to_come_again(rule, sent, then, after_s, retry_s):
    book = tenants(a=rule)
    for tokens in sent:
        assert book.enter("a", tokens, START_S) is None
    refused = book.enter("a", then, START_S + after_s)
    if retry_s is None:
        assert refused is None
        return
    assert refused.status == 429
    assert refused.retry_after_s == pytest.approx(retry_s)
    assert "'a'" in refused.reason
    assert "scheduler.tenants" in refused.reason


def test_who_comes_again_when_told_is_admitted():
    book = tenants(a={"prompt_tokens_per_s": 7})
    assert book.enter("a", 69, START_S) is None
    refused = book.enter("a", 33, START_S)
    assert book.enter("a", 33, START_S + refused.retry_after_s + 1e-9) is None


def test_a_request_that_ends_makes_room_and_one_that_was_not_read_costs_nothing():
    book = tenants(a={"max_requests": 1, "prompt_tokens_per_s": 1, "burst_tokens": 100})
    assert book.enter("a", 100, START_S) is None
    book.leave("a", 100)
    assert book.enter("a", 100, START_S) is None
    book.leave("a")
    assert book.enter("a", 100, START_S).retry_after_s == pytest.approx(100.0)


def test_strangers_share_a_rule_and_no_account():
    book = tenants(anybody={"max_requests": 1}, a={"max_requests": 2})
    assert book.enter("x", 1, START_S) is None
    assert book.enter("y", 1, START_S) is None
    assert book.enter(None, 1, START_S) is None
    assert book.enter("x", 1, START_S).status == 429
    assert book.enter(None, 1, START_S).status == 429
    assert [book.enter("a", 1, START_S) is None for _ in range(3)] == [True, True, False]


def test_strangers_are_free_where_no_rule_speaks_of_them():
    book = tenants(a={"max_requests": 1})
    assert all(book.enter("x", 10**9, START_S) is None for _ in range(5))
    assert book.rule("x") is None


def test_a_tenant_called_like_the_rule_for_strangers_is_a_stranger():
    book = tenants(anybody={"max_requests": 1})
    assert book.enter("*", 1, START_S) is None
    assert book.enter("z", 1, START_S) is None


def test_accounts_are_forgotten_but_not_those_with_requests(monkeypatch):
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 20)
    book = tenants(anybody={"max_requests": 1})
    assert book.enter("busy", 1, START_S) is None
    for number in range(200):
        assert book.enter(f"t{number}", 1, START_S) is None
        book.leave(f"t{number}")
    assert len(book) <= 21
    assert book.enter("busy", 1, START_S).status == 429


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.floats(1, 1000),
    st.integers(1, 5000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 8000)), max_size=60),
)
def test_no_tenant_gets_more_than_its_rate_and_one_burst(per_s, burst, requests):
    book = tenants(a={"prompt_tokens_per_s": per_s, "burst_tokens": burst})
    now_s, taken, last = START_S, 0, 0
    for pause_s, tokens in requests:
        now_s += pause_s
        if book.enter("a", tokens, now_s) is None:
            taken, last = taken + tokens, tokens
            book.leave("a")
    # the last prompt may exceed what the bucket can hold
    assert taken <= burst + per_s * (now_s - START_S) + last + 1e-3
