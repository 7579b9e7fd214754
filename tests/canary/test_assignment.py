"""Which arm a request goes to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.canary.assignment import Assigner, Match, Subject, prefix_of
from disagg_plugins.canary.override import OVERRIDE_HEADER, MintedBy, mint_override

SECRET = b"0123456789abcdef"
NOW_S = 1_790_000_000.0
KINDS = ("session", "user", "tenant", "prefix", "request")
KEYS = st.text(min_size=1, max_size=20)


def assigner(salt="one", **more):
    return Assigner(SECRET, salt, **more)


def sessions(count):
    return [Subject(f"r{i}", session=f"s{i}") for i in range(count)]


def arms(assigner, weight, subjects):
    return [assigner.assign(s, weight, NOW_S).arm for s in subjects]


@pytest.mark.parametrize("weight", [0.1, 1, 5, 33.3, 50, 99])
@pytest.mark.parametrize("salt", ["one", "two"])
def test_the_candidate_gets_its_share(weight, salt):
    count, share = 10_000, weight / 100
    found = arms(assigner(salt), weight, sessions(count)).count("candidate")
    assert abs(found - count * share) <= 4.5 * math.sqrt(count * share * (1 - share))


def test_no_weight_is_nobody_and_all_weight_is_everybody():
    assert set(arms(assigner(), 0, sessions(5_000))) == {"baseline"}
    assert set(arms(assigner(), 100, sessions(5_000))) == {"candidate"}


@given(KEYS, st.floats(0, 100), st.floats(0, 100), KEYS)
def test_where_the_weight_grows_nobody_leaves_the_candidate(key, one, other, salt):
    subject, low, high = Subject("r", session=key), min(one, other), max(one, other)
    before, after = (assigner(salt).assign(subject, w, NOW_S).arm for w in (low, high))
    assert (before, after) != ("candidate", "baseline")


def test_no_more_move_than_the_weight_grows_by():
    subjects = sessions(20_000)
    before, after = (arms(assigner(), w, subjects) for w in (5, 10))
    moved = sum(b != a for b, a in zip(before, after, strict=True))
    assert abs(moved - 1_000) <= 4.5 * math.sqrt(20_000 * 0.05 * 0.95)


def test_another_rollout_tries_others():
    subjects = sessions(20_000)
    one, two = (arms(assigner(salt), 20, subjects) for salt in ("one", "two"))
    both = sum(a == b == "candidate" for a, b in zip(one, two, strict=True))
    assert abs(both - 800) <= 4.5 * math.sqrt(20_000 * 0.04 * 0.96)


def test_another_fleet_tries_others():
    subjects = sessions(1_000)
    other = Assigner(b"another secret of a fleet", "one")
    assert arms(assigner(), 50, subjects) != arms(other, 50, subjects)


@given(st.lists(KEYS, min_size=5, max_size=5), st.floats(0, 100), st.sampled_from(KINDS))
@settings(max_examples=50)
def test_gateways_agree_without_talking(keys, weight, sticky):
    subject = Subject(keys[0], None, *keys[1:])
    first, second = (assigner(sticky=sticky).assign(subject, weight, NOW_S) for _ in range(2))
    assert first == second
    assert first.by == sticky


@given(st.text(max_size=300), st.floats(0, 100))
def test_all_requests_of_a_session_go_to_one_arm(session, weight):
    one, other = (
        assigner().assign(Subject(r, user="u", session=session, tenant=r), weight, NOW_S)
        for r in ("a", "b")
    )
    assert one.arm == other.arm


@pytest.mark.parametrize(
    ("sticky", "has", "by"),
    [
        ("session", {"user", "tenant", "prefix"}, "user"),
        ("session", {"tenant", "prefix"}, "request"),
        ("user", {"session", "tenant"}, "session"),
        ("tenant", {"session", "user"}, "user"),
        ("tenant", {"session"}, "session"),
        ("prefix", {"session", "user", "tenant"}, "session"),
        ("prefix", {"user"}, "user"),
        ("prefix", {"tenant"}, "request"),
        ("request", {"session", "user", "tenant", "prefix"}, "request"),
    ],
)
def test_without_its_key_the_next_best_decides(sticky, has, by):
    subject = Subject("r", **dict.fromkeys(has, "x"))
    assert assigner(sticky=sticky).assign(subject, 50, NOW_S).by == by


def test_a_session_and_a_user_of_one_name_have_places_of_their_own():
    one = assigner().assign(Subject("r", session="x"), 50, NOW_S)
    other = assigner().assign(Subject("r", user="x"), 50, NOW_S)
    assert one.place != other.place


RULES = (
    Match("candidate", model="small", tenant="lab"),
    Match("baseline", tenant="bank"),
    Match("candidate", header=("x-team", "core")),
)


@pytest.mark.parametrize(
    ("subject", "arm", "rule"),
    [
        (Subject("r", model="small", tenant="lab"), "candidate", 0),
        (Subject("r", tenant="bank", headers={"x-team": "core"}), "baseline", 1),
        (Subject("r", headers={"x-team": "core"}), "candidate", 2),
    ],
)
@pytest.mark.parametrize("weight", [0, 50, 100])
def test_the_first_rule_that_fits_goes_before_the_weight(subject, arm, rule, weight):
    found = assigner(rules=RULES).assign(subject, weight, NOW_S)
    assert (found.arm, found.by, found.rule) == (arm, "rule", rule)
    assert not found.random
    assert found.words == f"{arm}: canary.rules[{rule}]"


@pytest.mark.parametrize(
    "subject",
    [
        Subject("r", model="small"),
        Subject("r", model="Small", tenant="lab"),
        Subject("r", headers={"x-team": "cores"}),
        Subject("r"),
    ],
)
def test_a_rule_that_fits_in_part_decides_nothing(subject):
    assert assigner(rules=RULES).assign(subject, 50, NOW_S).random


def test_a_rule_for_an_arm_that_does_not_serve_is_passed_over():
    subject = Subject("r", headers={"x-team": "core"})
    found = assigner(rules=RULES).assign(subject, 50, NOW_S, ("baseline",))
    assert (found.arm, found.by, found.random) == ("baseline", "only arm", False)
    assert found.words == "baseline: the other does not serve"


def test_only_the_headers_that_may_decide_are_asked_for():
    assert assigner(rules=RULES).headers == {OVERRIDE_HEADER, "x-team"}


def test_what_the_weight_decided_is_told_without_the_key():
    found = assigner().assign(Subject("r", session="mail@example.org"), 5, NOW_S)
    assert found.random
    assert found.words == f"{found.arm}: by session, at {found.place:.4g} not below 5 %"


def asks(arm="candidate", secret=SECRET, canary="default", valid_s=60.0):
    header = mint_override(MintedBy(secret, canary), arm, now_s=NOW_S, valid_s=valid_s)
    return Subject("r", tenant="bank", headers={OVERRIDE_HEADER: header})


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
@pytest.mark.parametrize("weight", [0, 100])
def test_a_tester_chooses_before_all_rules(arm, weight):
    found = assigner(rules=RULES).assign(asks(arm), weight, NOW_S)
    assert (found.arm, found.by, found.random) == (arm, "override", False)
    assert found.words == f"{arm}: the client asked for it"


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        (asks(secret=b"another secret of a fleet"), "was not made with this fleet's secret"),
        (asks(canary="other"), "was not made with this fleet's secret for this canary"),
        (asks(valid_s=1e-3), "has ended"),
        (Subject("r", headers={OVERRIDE_HEADER: "candidate"}), "is not: arm, time, proof"),
    ],
)
def test_what_proves_nothing_is_passed_over_and_told(subject, why):
    found = assigner().assign(subject, 50, NOW_S)
    assert found.random
    assert why in found.refused
    assert "override not honoured" in found.words
    assert subject.headers[OVERRIDE_HEADER].split(" ")[-1] not in found.words.split()


def test_a_tester_does_not_reach_an_arm_that_does_not_serve():
    found = assigner().assign(asks(), 5, NOW_S, ("baseline",))
    assert (found.arm, found.refused) == ("baseline", "the candidate does not serve")


@pytest.mark.parametrize("weight", [-1, 100.1, math.nan, math.inf])
def test_no_weight_beyond_all_traffic(weight):
    with pytest.raises(ValueError, match="between 0 and 100"):
        assigner().assign(Subject("r"), weight, NOW_S)


def test_an_arm_must_serve_and_a_rollout_have_a_salt():
    with pytest.raises(ValueError, match="no arm"):
        assigner().assign(Subject("r"), 5, NOW_S, ())
    with pytest.raises(ValueError, match="salt"):
        Assigner(SECRET, "")


def test_prompts_that_begin_alike_have_one_prefix():
    assert prefix_of("a" * 2_000 + "b") == prefix_of("a" * 3_000)
    assert prefix_of("b" + "a" * 2_000) != prefix_of("a" * 2_000)
    assert prefix_of(list(range(300))) == prefix_of([*range(256), 7])
    assert prefix_of(list(range(300))) != prefix_of([1, *range(299)])


def test_a_short_prompt_has_no_prefix():
    assert prefix_of("a" * 1_023) is None
    assert prefix_of([1] * 255) is None
    assert prefix_of("a" * 1_024) is not None
