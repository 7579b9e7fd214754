"""Outcomes come in the order of arrival, and none is left out because it takes long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.cohort import Cohort
from disagg_plugins.canary.metrics import METRICS, Outcome

HORIZON_S = 10.0


@pytest.fixture
def cohort():
    return Cohort(HORIZON_S, most=100)


def unfinished(arrival_s, arm="candidate", **told):
    return Outcome(arm, arrival_s, "overdue", **told)


def ended(arrival_s, e2e_s, how="ok", arm="candidate", **told):
    return Outcome(arm, arrival_s, how, e2e_s=e2e_s, **told)


def test_a_short_answer_waits_for_a_long_one_that_came_first(cohort):
    cohort.enter("long", unfinished(0.0))
    cohort.enter("short", unfinished(1.0))
    short = ended(1.0, 0.5)
    assert cohort.end("short", short)
    assert cohort.due(2.0) == []
    long = ended(0.0, 8.0)
    cohort.end("long", long)
    assert cohort.due(8.0) == [long, short]
    assert len(cohort) == 0


def test_a_request_open_at_the_horizon_is_overdue(cohort):
    cohort.enter("stuck", unfinished(0.0))
    assert cohort.due(9.999) == []
    (found,) = cohort.due(10.0)
    assert found.ended == "overdue"
    assert METRICS["error_rate"].of(found) == 1.0
    assert METRICS["ttft"].of(found) == float("inf")
    assert not cohort.end("stuck", ended(0.0, 12.0))
    assert cohort.due(100.0) == []


def test_an_overdue_request_keeps_the_first_token_that_came(cohort):
    cohort.enter("slow", unfinished(0.0))
    cohort.first_token("slow", 0.4)
    (found,) = cohort.due(10.0)
    assert METRICS["ttft"].of(found) == 0.4
    assert METRICS["e2e"].of(found) == float("inf")


def test_it_makes_no_difference_when_one_looks(cohort):
    """An end after the horizon is overdue, whether somebody looked in between or not."""
    late = ended(0.0, 11.0, ttft_s=0.4, within_slo=True)
    cohort.enter("a", unfinished(0.0, within_slo=False))
    cohort.first_token("a", 0.4)
    cohort.end("a", late)
    other = Cohort(HORIZON_S, most=100)
    other.enter("a", unfinished(0.0, within_slo=False))
    other.first_token("a", 0.4)
    looked = other.due(10.5)
    assert cohort.due(20.0) == looked
    assert looked[0].within_slo is False


def test_a_first_token_after_the_horizon_is_none(cohort):
    cohort.enter("a", unfinished(0.0))
    cohort.first_token("a", 10.5)
    cohort.end("a", ended(0.0, 11.0, ttft_s=10.5))
    assert cohort.due(20.0)[0].ttft_s is None


def test_a_client_that_left_after_the_horizon_had_waited_too_long(cohort):
    cohort.enter("a", unfinished(0.0))
    cohort.end("a", ended(0.0, 10.5, "client_gone"))
    assert cohort.due(20.0)[0].ended == "overdue"


def test_reports_have_a_grace_after_the_horizon():
    cohort = Cohort(HORIZON_S, grace_s=2.0, most=10)
    cohort.enter("a", unfinished(0.0))
    assert cohort.due(11.9) == []
    assert cohort.end("a", ended(0.0, 9.5))
    assert cohort.due(12.0)[0].ended == "ok"


def test_no_more_than_the_bound_are_held_and_the_others_are_counted():
    cohort = Cohort(HORIZON_S, most=2)
    entered = [cohort.enter(name, unfinished(0.0)) for name in "abc"]
    assert entered == [True, True, False]
    assert (len(cohort), cohort.skipped) == (2, 1)
    assert not cohort.end("c", ended(0.0, 1.0))
    assert len(cohort.due(10.0)) == 2
    assert cohort.enter("d", unfinished(11.0))


def test_ended_ones_that_wait_for_their_turn_are_bounded_too():
    cohort = Cohort(HORIZON_S, most=2)
    cohort.enter("stuck", unfinished(0.0))
    cohort.enter("b", unfinished(0.0))
    cohort.end("b", ended(0.0, 1.0))
    assert not cohort.enter("c", unfinished(0.0))


def test_a_name_is_free_again_when_its_request_has_ended(cohort):
    cohort.enter("a", unfinished(0.0))
    assert not cohort.enter("a", unfinished(1.0))
    cohort.end("a", ended(0.0, 1.0))
    assert cohort.enter("a", unfinished(2.0))


def test_a_request_that_was_never_sent_is_forgotten(cohort):
    cohort.enter("a", unfinished(0.0))
    cohort.enter("b", unfinished(1.0))
    cohort.forget("a")
    cohort.forget("unknown")
    assert [o.arrival_s for o in cohort.due(11.0)] == [1.0]


def test_what_nobody_knows_is_not_counted(cohort):
    assert not cohort.end("a", ended(0.0, 1.0))
    cohort.first_token("a", 1.0)
    assert cohort.due(100.0) == []


def test_an_arrival_out_of_order_is_an_error(cohort):
    cohort.enter("a", unfinished(1.0))
    with pytest.raises(ValueError, match="before the last one"):
        cohort.enter("b", unfinished(0.5))
    with pytest.raises(ValueError, match="before the last one"):
        cohort.enter("b", unfinished(float("nan")))
    with pytest.raises(ValueError, match="unfinished outcome"):
        cohort.enter("b", ended(2.0, 1.0))


@pytest.mark.parametrize("wrong", [{"horizon_s": 0.0}, {"grace_s": -1.0}, {"most": 0}])
def test_bounds_are_positive(wrong):
    with pytest.raises(ValueError, match="horizon"):
        Cohort(**({"horizon_s": 1.0, "grace_s": 0.0, "most": 1} | wrong))


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 30)), max_size=30),
    st.lists(st.floats(0, 100), max_size=10),
)
def test_whoever_looks_whenever_gets_the_same_in_the_order_of_arrival(requests, looks):
    """Gaps and durations; every request comes out once, by its duration alone."""
    arrivals, now_s = [], 0.0
    for gap_s, e2e_s in requests:
        now_s += gap_s
        arrivals.append((now_s, e2e_s))
    events = [(at_s, 0, i) for i, (at_s, _) in enumerate(arrivals)]
    events += [(at_s + e2e_s, 1, i) for i, (at_s, e2e_s) in enumerate(arrivals)]
    events += [(at_s, 2, -1) for at_s in looks]
    cohort, found = Cohort(HORIZON_S, most=100), []
    for at_s, kind, i in sorted(events):
        if kind == 0:
            cohort.enter(str(i), unfinished(at_s, output_tokens=i))
        elif kind == 1:
            cohort.end(str(i), ended(arrivals[i][0], arrivals[i][1], output_tokens=i))
        else:
            found += cohort.due(at_s)
    found += cohort.due(1e6)
    assert [o.output_tokens for o in found] == list(range(len(requests)))
    for outcome, (_, e2e_s) in zip(found, arrivals, strict=True):
        # within a rounding of the horizon either is right
        if abs(e2e_s - HORIZON_S) > 1e-6:
            assert outcome.ended == ("ok" if e2e_s < HORIZON_S else "overdue")
