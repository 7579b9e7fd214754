"""Who goes next of those that wait for a prefill worker."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.scheduling.prefill_queue import SPARE, PrefillQueue
from disagg_plugins.types import RequestProfile

ORDERS = ("fifo", "shortest", "deadline")
SOON = 0.5


def profile(tokens=100, priority=0, ttft_slo_s=None, arrival_s=0.0):
    return RequestProfile(
        "r",
        "/v1/completions",
        "m",
        tokens,
        arrival_s=arrival_s,
        priority=priority,
        ttft_slo_s=ttft_slo_s,
    )


def add(queue, name, now_s=0.0, *, score=0.5, tenant="", weight=1.0, **of):
    return queue.add(
        profile(**of, arrival_s=now_s), name, now_s=now_s, score=score, tenant=tenant, weight=weight
    )


def served(queue, now_s):
    """Return who gets the next slot, and give it."""
    request = next(queue.offers(now_s, 1))
    assert queue.serve(request)
    return request


def drained(queue, now_s=SOON):
    return "".join(served(queue, now_s).payload for _ in range(len(queue)))


def test_first_come_is_first_served():
    queue = PrefillQueue("fifo")
    for name, tokens in ("a", 900), ("b", 5), ("c", 300):
        add(queue, name, tokens=tokens)
    assert drained(queue) == "abc"


def test_the_shortest_prompt_goes_first():
    queue = PrefillQueue("shortest")
    for name, tokens in ("a", 900), ("b", 5), ("c", 300), ("d", 5):
        add(queue, name, tokens=tokens)
    assert drained(queue) == "bdca"


def test_a_long_prompt_that_waited_long_enough_goes_before_short_ones():
    queue = PrefillQueue("shortest", ageing_s=1.0)
    add(queue, "long", 0.0, tokens=9000)
    add(queue, "short", 0.9, tokens=5)
    assert next(queue.offers(0.99, 1)).payload == "short"
    assert next(queue.offers(1.0, 1)).payload == "long"


def test_the_earliest_ttft_bound_goes_first():
    queue = PrefillQueue("deadline", ageing_s=1.0)
    add(queue, "a", 0.0, ttft_slo_s=9.0)
    add(queue, "b", 0.1, ttft_slo_s=0.6)
    add(queue, "c", 0.2)  # no bound: as if ageing_s was it
    add(queue, "d", 0.3, ttft_slo_s=0.5)
    assert drained(queue, 0.4) == "bdca"


def test_a_late_batch_request_ages_only_after_its_own_bound():
    queue = PrefillQueue("deadline", ageing_s=1.0)
    add(queue, "batch", 0.0, ttft_slo_s=60.0)
    add(queue, "chat", 30.0, ttft_slo_s=0.5)
    assert next(queue.offers(30.1, 1)).payload == "chat"


def test_what_plugins_say_comes_before_the_order():
    queue = PrefillQueue("shortest")
    add(queue, "a", tokens=5)
    add(queue, "b", tokens=900, score=0.9)
    add(queue, "c", tokens=1, score=0.1)
    assert drained(queue) == "bac"


def test_a_higher_priority_goes_first_whatever_has_aged():
    queue = PrefillQueue("fifo", ageing_s=1.0)
    add(queue, "a", 0.0)
    add(queue, "b", 50.0, priority=1)
    assert drained(queue, 60.0) == "ba"


def test_a_tenant_with_many_requests_does_not_keep_another_waiting():
    queue = PrefillQueue("fifo")
    for _ in range(50):
        add(queue, "x", tenant="flood")
    add(queue, "y", tenant="quiet")
    assert "y" in drained(queue)[:2]


def test_a_tenant_saves_up_nothing_while_it_asks_for_nothing():
    queue = PrefillQueue("fifo")
    for _ in range(10):
        add(queue, "a", tenant="a")
    for _ in range(8):
        served(queue, SOON)
    for _ in range(10):
        add(queue, "b", tenant="b")
    assert drained(queue)[:4].count("a") == 2


def test_who_cannot_use_a_slot_is_passed_over_and_keeps_its_place():
    queue = PrefillQueue("fifo")
    for name in "abc":
        add(queue, name)
    assert [r.payload for r in queue.offers(SOON, 2)] == ["a", "b"]
    assert [r.payload for r in queue.offers(SOON, 9)] == ["a", "b", "c"]
    queue.serve(list(queue.offers(SOON, 2))[1])
    assert drained(queue) == "ac"


def test_who_left_is_gone_and_leaves_once():
    queue = PrefillQueue("fifo")
    a, b = add(queue, "a", tokens=7), add(queue, "b", tokens=5)
    assert queue.tokens_before(0) == 12
    assert queue.leave(a)
    assert not queue.leave(a)
    assert not queue.serve(a)
    assert (len(queue), queue.tokens_before(0), queue.tokens_of("")) == (1, 5, 5)
    assert next(queue.offers(SOON, 1)) is b


def test_what_waits_before_a_request_is_told_by_priority():
    queue = PrefillQueue("fifo")
    add(queue, "a", tokens=10, priority=1)
    add(queue, "b", tokens=100, priority=0)
    assert [queue.tokens_before(p) for p in (2, 1, 0)] == [0, 10, 110]


def test_those_that_wait_too_long_are_named():
    queue = PrefillQueue("shortest")
    add(queue, "a", 1.0)
    add(queue, "b", 2.0)
    assert [r.payload for r in queue.late(1.0)] == ["a"]


def test_many_that_come_and_leave_take_no_memory():
    queue = PrefillQueue("shortest")
    keep = add(queue, "keep", tokens=1)
    for number in range(20 * SPARE):
        queue.leave(add(queue, "x", tenant=f"t{number % (4 * SPARE)}"))
    (level,) = queue._levels.values()
    assert len(level.lines) <= 2 + SPARE + 1
    assert sum(len(x.by_rank) + len(x.by_age) for x in level.lines.values()) < 8 * SPARE
    queue.leave(keep)
    assert not queue._levels
    assert not queue._tokens_of


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "serve", "leave"]),
        st.sampled_from("xyz"),
        st.integers(1, 2000),
        st.sampled_from([0, 0, 5]),
        st.sampled_from([None, 0.3, 4.0]),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(ORDERS), STEPS)
def test_everybody_who_waits_is_offered_and_the_first_offer_is_who_goes_next(order, steps):
    queue, here = PrefillQueue(order), set()
    for step, (what, tenant, tokens, priority, slo_s) in enumerate(steps):
        now_s = step / 10
        if what == "add":
            here.add(
                add(
                    queue,
                    step,
                    now_s,
                    tenant=tenant,
                    tokens=tokens,
                    priority=priority,
                    ttft_slo_s=slo_s,
                )
            )
        elif here and what == "serve":
            here.discard(served(queue, now_s))
        elif here:
            gone = sorted(here, key=lambda r: r.payload)[tokens % len(here)]
            here.discard(gone)
            queue.leave(gone)
        offers = list(queue.offers(now_s, 1000))
        assert len(queue) == len(offers) == len(here)
        assert set(offers) == here  # work conservation: no waiting request is out of reach
        assert queue.tokens_before(-1) == sum(r.prompt_tokens for r in here)
        if offers:
            assert offers[0].priority == max(r.priority for r in here)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(ORDERS),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(1, 500), st.floats(0.0, 1.0)), min_size=80, max_size=80),
)
def test_nobody_starves_however_many_better_ones_keep_coming(order, before, others):
    """At one slot a step and one arrival a step, the worst request goes once it is the oldest."""
    queue, ageing_s = PrefillQueue(order, ageing_s=10.0), 10.0
    for number in range(before):
        add(queue, number, 0.0, tokens=1, score=1.0, ttft_slo_s=0.1)
    victim = add(queue, "victim", 0.0, tokens=100_000, score=0.0, ttft_slo_s=10.0)
    for step, (tokens, score) in enumerate(others, 1):
        add(queue, step, float(step), tokens=tokens, score=score, ttft_slo_s=0.1)
        served(queue, float(step))
        if not victim.here:
            break
    assert not victim.here
    assert step <= ageing_s + before + 12  # those that aged before it, one a step


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4),
    st.lists(st.integers(1, 3000), min_size=200, max_size=200),
)
def test_tenants_that_always_wait_share_by_weight_within_a_prompt_each(weights, sizes):
    queue, largest = PrefillQueue("shortest", ageing_s=5.0), max(sizes)
    had, order = defaultdict(float), iter(range(10**6))
    supply = iter(sizes * 10)
    for step in range(200):
        for number, weight in enumerate(weights):
            while queue.tokens_of(f"t{number}") == 0:
                add(
                    queue,
                    next(order),
                    step / 10,
                    tenant=f"t{number}",
                    tokens=next(supply),
                    weight=weight,
                )
        request = served(queue, step / 10)
        had[request.tenant] += request.prompt_tokens / request.weight
        for a, weight_a in enumerate(weights):
            for b, weight_b in enumerate(weights):
                bound = largest / weight_a + largest / weight_b
                assert had[f"t{a}"] - had[f"t{b}"] <= bound + 1e-6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 2000)), max_size=60))
def test_each_tenants_requests_go_in_order_of_arrival(requests):
    queue = PrefillQueue("fifo", ageing_s=1.0)
    for step, (tenant, tokens) in enumerate(requests):
        add(queue, step, step / 20, tenant=tenant, tokens=tokens)
    went = defaultdict(list)
    for step in range(len(requests)):
        request = served(queue, step / 10)
        went[request.tenant].append(request.payload)
    assert all(payloads == sorted(payloads) for payloads in went.values())


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_queue_offers_nobody(order):
    assert list(PrefillQueue(order).offers(0.0, 5)) == []
