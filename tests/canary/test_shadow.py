"""Copies of requests: which, how many, and in pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugins.canary.answer import Answer
from disagg_plugins.canary.shadow import (
    HELD_PER_COPY,
    SHADOW_HEADER,
    Budget,
    Lost,
    Original,
    Pair,
    Shadow,
    side_effects,
)
from disagg_plugins.canary.shadow_headers import ShadowHeaders

SECRET = b"0123456789abcdef"
BUDGET = Budget(
    share=1.0,
    control=0.5,
    max_in_flight=4,
    max_per_s=1_000.0,
    timeout_s=60.0,
    max_body_bytes=10_000,
)
ANSWER = Answer(ids=(1, 2))


def shadow(salt="one", headers=None, **changed):
    return Shadow(SECRET, salt, replace(BUDGET, **changed), headers or ShadowHeaders())


def original(name="r", **changed):
    return replace(Original(name, "baseline", 1_000, 500), **changed)


def copies(shadow, count, now_s=0.0, step_s=0.0):
    made = [shadow.consider(original(f"r{i}"), {}, now_s + i * step_s) for i in range(count)]
    return [copy for copy in made if copy is not None]


def test_a_copy_has_an_id_of_its_own_and_is_marked():
    copy = shadow().consider(original("x" * 128), {"x-request-id": "x"}, 10.0)
    assert copy.ends_s == 70.0
    assert len(copy.name) < 64
    assert copy.headers == (("x-request-id", copy.name), (SHADOW_HEADER, "1"))
    assert "headers" not in repr(copy)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"arm": "candidate"}, "not of the baseline"),
        ({"is_copy": True}, "a copy itself"),
        ({"random": False}, "sent by a rule or a tester"),
        ({"effects": "store"}, "side effects"),
        ({"body_bytes": 10_001}, "too large"),
    ],
)
def test_what_must_not_be_copied_is_not_and_says_why(changed, why):
    found = shadow()
    assert found.consider(original(**changed), {}, 0.0) is None
    assert found.skipped == {why: 1}
    assert len(found) == 0


def test_nothing_is_copied_while_an_arm_does_not_serve():
    found = shadow()
    for serving in (("baseline",), ("candidate",)):
        assert found.consider(original(), {}, 0.0, serving) is None
    assert found.skipped == {"the candidate does not serve": 2}


@pytest.mark.parametrize(("share", "control"), [(0.1, 0.5), (0.5, 0.25), (1.0, 0.0), (1.0, 1.0)])
def test_chance_takes_the_share_and_divides_it(share, control):
    found = shadow(share=share, control=control, max_in_flight=100_000, max_per_s=100_000.0)
    count = 10_000
    made = copies(found, count)
    assert abs(len(made) - count * share) <= 4.5 * math.sqrt(count * share * (1 - share)) + 1e-9
    again = sum(copy.arm == "baseline" for copy in made)
    spread = math.sqrt(len(made) * control * (1 - control))
    assert abs(again - len(made) * control) <= 4.5 * spread + 1e-9


def test_gateways_and_restarts_choose_alike_and_rollouts_do_not():
    one, two, other = (
        {c.original.request_id for c in copies(shadow(s, share=0.3, max_in_flight=999), 500)}
        for s in ("one", "one", "two")
    )
    assert one == two != other


def test_so_many_are_in_flight_at_once_and_no_more():
    found = shadow()
    made = copies(found, 10)
    assert (len(made), found.in_flight) == (4, 4)
    assert found.skipped == {"too many in flight": 6}
    found.copy_ended(made[0].name, ANSWER)
    assert found.consider(original("later"), {}, 1.0) is not None


def test_answers_that_wait_for_their_originals_are_bounded_too():
    found = shadow()
    for i in range(4 * HELD_PER_COPY):
        copy = found.consider(original(f"r{i}"), {}, 0.0)
        assert found.copy_ended(copy.name, ANSWER) is None
    assert found.consider(original("one more"), {}, 0.0) is None
    assert found.skipped == {"too many wait for their originals": 1}


def test_so_many_begin_a_second_and_no_more():
    found = shadow(max_per_s=2.0, max_in_flight=1_000)
    assert len(copies(found, 100, 0.0, 0.1)) in (21, 22)  # two at once, and two in each of 9.9 s
    assert len(copies(shadow(max_per_s=0.1, max_in_flight=9), 100, 0.0, 0.1)) == 1


def test_a_clock_that_goes_back_gives_nothing():
    found = shadow(max_per_s=1.0)
    assert found.consider(original("a"), {}, 100.0) is not None
    assert found.consider(original("b"), {}, 1.0) is None
    assert found.consider(original("c"), {}, 100.5) is None
    assert found.consider(original("d"), {}, 101.0) is not None


@pytest.mark.parametrize("first", ["original", "copy"])
def test_both_answers_make_a_pair_in_any_order(first):
    found = shadow()
    copy = found.consider(original(), {}, 0.0)
    ours, theirs = Answer(ids=(1,)), Answer(ids=(2,))
    steps = {
        "original": lambda: found.original_ended("r", ours),
        "copy": lambda: found.copy_ended(copy.name, theirs),
    }
    assert steps.pop(first)() is None
    assert next(iter(steps.values()))() == Pair(copy, ours, theirs)
    assert (len(found), found.in_flight, found.next_due_s()) == (0, 0, None)


def test_a_copy_that_fails_is_lost_and_its_arm_is_blamed():
    found = shadow()
    copy = found.consider(original(), {}, 0.0)
    assert found.copy_ended(copy.name, None) == Lost(copy, blamed=True, in_flight=False)
    assert found.original_ended("r", ANSWER) is None
    assert (len(found), found.in_flight) == (0, 0)


def test_a_client_that_leaves_takes_the_copy_with_it_and_nobody_is_blamed():
    found = shadow()
    copy = found.consider(original(), {}, 0.0)
    assert found.original_ended("r", None) == Lost(copy, blamed=False, in_flight=True)
    assert (len(found), found.in_flight) == (0, 0)
    assert found.copy_ended(copy.name, ANSWER) is None


def test_who_is_late_is_given_up():
    found = shadow()
    late = found.consider(original("late"), {}, 0.0)
    waits = found.consider(original("waits"), {}, 1.0)
    found.copy_ended(waits.name, ANSWER)
    found.original_ended("late", ANSWER)
    assert found.next_due_s() == 60.0
    assert found.due(59.0) == []
    assert found.due(61.0) == [
        Lost(late, blamed=True, in_flight=True),
        Lost(waits, blamed=False, in_flight=False),
    ]
    assert (len(found), found.in_flight) == (0, 0)


def test_two_requests_of_one_id_are_no_pair():
    found = shadow()
    assert found.consider(original(), {}, 0.0) is not None
    assert found.consider(original(), {}, 0.0) is None
    assert found.skipped == {"its id is in use": 1}


@pytest.mark.parametrize(
    ("endpoint", "body", "effect"),
    [
        ("/v1/completions", {"prompt": "x"}, None),
        ("/v1/chat/completions", {"messages": [], "tools": [{}], "store": False}, None),
        ("/v1/chat/completions", {"store": True}, "store"),
        ("/v1/chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("/v1/completions", {"kv_transfer_params": {"disagg": {}}}, "kv_transfer_params"),
        ("/v1/completions", {"bootstrap_room": 0}, "bootstrap_room"),
        ("/v1/responses", {}, "/v1/responses"),
    ],
)
def test_requests_that_do_more_than_answer_are_known(endpoint, body, effect):
    assert side_effects(endpoint, body) == effect


@pytest.mark.parametrize(
    "changed",
    [
        {"share": 0.0},
        {"share": 1.1},
        {"control": -0.1},
        {"max_in_flight": 0},
        {"max_per_s": 0.0},
        {"max_per_s": math.inf},
        {"timeout_s": math.nan},
        {"max_body_bytes": 0},
    ],
)
def test_budgets_that_cannot_be_are_refused(changed):
    with pytest.raises(ValueError, match="cannot be"):
        replace(BUDGET, **changed)


class Traffic(RuleBasedStateMachine):
    """Whatever happens in whatever order: nothing leaks, and each pair has one end."""

    names = st.sampled_from([f"r{i}" for i in range(12)])
    answers = st.sampled_from([None, ANSWER])

    def __init__(self):
        super().__init__()
        self.shadow = shadow()
        self.now_s = 0.0
        self.open = {}
        self.running = set()

    def finish(self, ended):
        for one in ended if isinstance(ended, list) else [ended]:
            if one is not None:
                del self.open[one.copy.name]
                if isinstance(one, Lost):
                    assert one.in_flight == (one.copy.name in self.running)
                self.running.discard(one.copy.name)

    @rule(name=names, wait_s=st.floats(0, 20))
    def arrives(self, name, wait_s):
        self.now_s += wait_s
        copy = self.shadow.consider(original(name), {}, self.now_s)
        if copy is not None:
            assert copy.name not in self.open
            self.open[copy.name] = copy
            self.running.add(copy.name)

    @rule(name=names, answer=answers)
    def original_ends(self, name, answer):
        self.finish(self.shadow.original_ended(name, answer))

    @rule(pick=st.integers(0, 20), answer=answers)
    def copy_ends(self, pick, answer):
        if self.running:
            name = sorted(self.running)[pick % len(self.running)]
            self.running.discard(name)
            self.finish(self.shadow.copy_ended(name, answer))

    @rule()
    def timer(self):
        self.finish(self.shadow.due(self.now_s))
        assert all(copy.ends_s > self.now_s for copy in self.open.values())

    @invariant()
    def nothing_leaks(self):
        assert len(self.shadow) == len(self.open) <= 4 * HELD_PER_COPY
        assert self.shadow.in_flight == len(self.running) <= 4


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
