"""All guardrails together: one that is worse rolls back, all that are required promote."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.canary.guardrail import Guardrail
from disagg_plugins.canary.guardrails import Guardrails
from disagg_plugins.canary.metrics import Outcome
from disagg_plugins.errors import ConfigError, DamagedState

LEVEL = 0.05
TTFT = Guardrail(metric="ttft", quantile=0.9, ratio=1.3)
TPOT = Guardrail(metric="tpot", quantile=0.9, ratio=0.9)
ERRORS = Guardrail(metric="error_rate", slack=0.02)
GOODPUT = Guardrail(metric="goodput", ratio=0.95)
KV = Guardrail(metric="kv_failures", limit=0.05)
ALL = (TTFT, TPOT, ERRORS, GOODPUT, KV)


def fill(guardrails, arm, seed, count=4_000, *, ttft=1.0, tpot=1.0, errors=0.0, kv=0.0, good=0.9):
    """Count the requests of an arm whose latencies have these factors."""
    rng = np.random.default_rng(seed)
    noise = rng.lognormal(0, 0.3, (2, count))
    drawn = rng.random((3, count))
    for i in range(count):
        guardrails.observe(
            Outcome(
                arm, float(i), "error" if drawn[0, i] < errors else "ok",
                ttft_s=0.3 * ttft * noise[0, i], tpot_s=0.02 * tpot * noise[1, i], e2e_s=3.0,
                within_slo=bool(drawn[1, i] < good), to_split=arm == "candidate",
                kv_failed=bool(drawn[2, i] < kv) if arm == "candidate" else None,
            )
        )  # fmt: skip
    return guardrails


def canary(guardrails=ALL, **candidate):
    filled = fill(Guardrails(guardrails, LEVEL), "baseline", 1)
    return fill(filled, "candidate", 2, **candidate)


def answers(guardrails):
    return {v.guardrail.name: v.answer for v in guardrails.judge().verdicts}


def test_a_candidate_that_trades_ttft_for_tpot_within_the_margins_is_promoted():
    judged = canary(ttft=1.15, tpot=0.7)
    assert judged.decide() == "promote"
    found = judged.judge()
    assert found.action == "promote"
    assert set(answers(judged).values()) == {"ok"}
    assert len(found.reasons) == len(ALL)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"ttft": 1.7, "tpot": 0.7}, "ttft p90"),
        ({"tpot": 1.1}, "tpot p90"),
        ({"tpot": 0.7, "errors": 0.06}, "error_rate"),
        ({"tpot": 0.7, "good": 0.75}, "goodput"),
        ({"tpot": 0.7, "kv": 0.1}, "kv_failures"),
    ],
)
def test_one_guardrail_that_is_worse_rolls_back_and_is_named(fault, name):
    judged = canary(**fault)
    assert judged.decide() == "rollback"
    found = judged.judge()
    assert found.action == "rollback"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith(f"{name} is worse than allowed: ")


def test_better_demanded_and_not_had_waits():
    judged = canary(tpot=0.9)  # exactly on the margin
    assert (judged.decide(), answers(judged)["tpot p90"]) == ("wait", "open")
    assert [r.split(":")[0] for r in judged.judge().reasons] == ["tpot p90 is not decided"]


def test_one_that_is_not_required_holds_no_promotion_up_but_rolls_back():
    optional = Guardrail(metric="tpot", quantile=0.9, ratio=0.9, required=False)
    assert canary((TTFT, ERRORS, optional), tpot=0.9).decide() == "promote"
    assert canary((TTFT, ERRORS, optional), tpot=1.1).decide() == "rollback"


def test_there_is_no_verdict_before_the_least_number_of_requests():
    limit = Guardrail(metric="error_rate", slack=0.02, min_samples=50)
    judged = Guardrails([limit], LEVEL)
    fill(judged, "baseline", 1, 400)
    fill(judged, "candidate", 2, 49, errors=1.0)
    assert judged.decide() == "wait"
    assert "the candidate has 49 of 50 independent requests needed" in judged.judge().reasons[0]
    fill(judged, "candidate", 3, 1, errors=1.0)
    assert judged.decide() == "rollback"


def test_a_candidate_that_fails_every_request_is_rolled_back_soon():
    judged = Guardrails(ALL, LEVEL)
    fill(judged, "baseline", 1, 500)
    fill(judged, "candidate", 2, 20, errors=1.0)
    assert judged.decide() == "rollback"


def test_without_any_request_one_waits():
    judged = Guardrails(ALL, LEVEL)
    assert judged.decide() == "wait"
    assert all("no request" in reason for reason in judged.judge().reasons)


def test_a_higher_share_is_worse_or_better_as_declared():
    fewer = Guardrail(metric="split_share", better="higher", limit=0.5)
    more = Guardrail(metric="split_share", better="lower", limit=0.5)
    for guardrail, action in ((fewer, "promote"), (more, "rollback")):
        judged = Guardrails([guardrail], LEVEL)
        judged.extend("candidate", "split_share", np.array([1.0, 1.0, 0.0, 1.0, 1.0] * 100))
        assert judged.decide() == action


def test_values_that_were_recorded_are_added_to_their_metric_only():
    judged = Guardrails([TTFT, ERRORS], LEVEL)
    judged.extend("baseline", "ttft", np.array([1.0, 2.0, math.inf]))
    assert judged.figure(TTFT, "baseline").count == 3
    assert judged.figure(TTFT, "candidate").count == 0
    assert judged.figure(ERRORS, "baseline").count == 0
    for arm, metric, value in (
        ("baseline", "goodput", 1.0),
        ("other", "ttft", 1.0),
        ("baseline", "ttft", -1.0),
        ("baseline", "error_rate", 1.5),
    ):
        with pytest.raises(ValueError, match=r"not counted|value"):
            judged.extend(arm, metric, np.array([0.5, value]))
    assert judged.figure(TTFT, "baseline").count == 3
    assert judged.figure(ERRORS, "baseline").count == 0


def test_requests_that_share_one_fate_are_no_proof():
    """Two thousand slow requests in six bursts are six events, not two thousand."""
    judged = Guardrails([TTFT], LEVEL)
    rng = np.random.default_rng(1)
    judged.extend("baseline", "ttft", rng.lognormal(0, 0.3, 10_000))
    bursts = np.where(np.arange(10_000) // 333 % 5 == 3, 3.0, 1.0)
    judged.extend("candidate", "ttft", bursts * rng.lognormal(0, 0.3, 10_000))
    figure = judged.figure(TTFT, "candidate")
    assert figure.estimate > 1.3 * judged.figure(TTFT, "baseline").estimate
    assert figure.factor > 50
    assert judged.decide() == "wait"
    assert "independent ones" in judged.judge().reasons[0]
    scattered = Guardrails([TTFT], LEVEL)
    scattered.extend("baseline", "ttft", rng.lognormal(0, 0.3, 10_000))
    shuffled = rng.permutation(bursts) * rng.lognormal(0, 0.3, 10_000)
    scattered.extend("candidate", "ttft", shuffled)
    assert scattered.decide() == "rollback"


def test_an_impossible_outcome_is_an_error_and_counts_nowhere():
    judged = Guardrails(ALL, LEVEL)
    with pytest.raises(ValueError, match="tpot is -1"):
        judged.observe(Outcome("candidate", 0.0, "ok", ttft_s=0.1, tpot_s=-1.0))
    assert judged.as_dict() == Guardrails(ALL, LEVEL).as_dict()


outcomes = st.lists(
    st.builds(
        Outcome,
        arm=st.sampled_from(["baseline", "candidate"]),
        arrival_s=st.just(0.0),
        ended=st.sampled_from(["ok", "error", "broken", "overdue", "rejected", "client_gone"]),
        ttft_s=st.none() | st.floats(0, 1e5),
        tpot_s=st.none() | st.floats(0, 10),
        e2e_s=st.none() | st.floats(0, 1e5),
        stream=st.booleans(),
        within_slo=st.none() | st.booleans(),
        kv_failed=st.none() | st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=50)
@given(outcomes, outcomes)
def test_the_evidence_of_several_gateways_adds_up(first, second):
    one, other, both = (Guardrails(ALL, LEVEL) for _ in range(3))
    for outcome in second:
        other.observe(outcome)
    for outcome in first:
        one.observe(outcome)
    for outcome in second + first:
        both.observe(outcome)
    one.merge(other)
    for guardrail in ALL:
        for arm in ("baseline", "candidate"):
            merged, whole = one.figure(guardrail, arm), both.figure(guardrail, arm)
            assert (merged.count, merged.estimate) == (whole.count, whole.estimate)
            if merged.factor == whole.factor:  # series that were apart are no one series
                assert merged.low == pytest.approx(whole.low)
                assert merged.high == pytest.approx(whole.high)


@settings(max_examples=50)
@given(outcomes)
def test_a_gateway_that_starts_again_goes_on_where_it_was(found):
    judged = Guardrails(ALL, LEVEL)
    for outcome in found:
        judged.observe(outcome)
    again = Guardrails.from_dict(json.loads(json.dumps(judged.as_dict())), ALL, LEVEL)
    assert again.judge() == judged.judge()
    assert again.as_dict() == judged.as_dict()


@settings(max_examples=50)
@given(outcomes)
def test_deciding_and_judging_say_the_same(found):
    judged = Guardrails(ALL, LEVEL)
    for outcome in found:
        judged.observe(outcome)
    assert judged.decide() == judged.judge().action


def test_evidence_of_other_guardrails_is_not_added():
    with pytest.raises(ValueError, match="other guardrails"):
        Guardrails(ALL, LEVEL).merge(Guardrails(ALL[:2], LEVEL))
    with pytest.raises(ValueError, match="other guardrails"):
        Guardrails(ALL, LEVEL).merge(Guardrails(ALL, 0.01))


def change(state, *path, to):
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return state


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("version",), 2),
        (("version",), True),
        (("version",), None),
        (("level",), 0.1),
        (("level",), "0.05"),
        (("guardrails",), []),
        (("guardrails", 0, "ratio"), 2.0),
        (("baseline",), None),
        (("baseline",), {}),
        (("candidate", "ttft"), None),
        (("candidate", "ttft", "values", "counts"), [-1]),
        (("candidate", "error_rate", "share", "total"), 1e9),
        (("candidate", "error_rate", "share", "total"), math.nan),
        (("candidate", "error_rate", "dependence", "merged"), -1),
        (("candidate", "unknown"), {}),
        (("more",), 1),
    ],
)
def test_a_damaged_state_or_one_of_other_guardrails_is_an_error(path, to):
    judged = fill(Guardrails(ALL, LEVEL), "candidate", 1, 5)
    state = change(judged.as_dict(), *path, to=to)
    with pytest.raises(DamagedState, match="begin the canary anew"):
        Guardrails.from_dict(state, ALL, LEVEL)


@pytest.mark.parametrize("state", [None, [], "", 3, {}])
def test_what_is_no_state_is_an_error(state):
    with pytest.raises(DamagedState):
        Guardrails.from_dict(state, ALL, LEVEL)


@pytest.mark.parametrize(
    ("guardrails", "level", "problem"),
    [
        ([], LEVEL, "no guardrail is required"),
        ([Guardrail(metric="error_rate", required=False)], LEVEL, "no guardrail is required"),
        ([TTFT, Guardrail(metric="ttft", quantile=0.9)], LEVEL, "named twice: ttft p90"),
        (ALL, 0.0, "no chance"),
        (ALL, 1.0, "no chance"),
        (ALL, math.nan, "no chance"),
    ],
)
def test_guardrails_that_do_not_go_together_are_an_error(guardrails, level, problem):
    with pytest.raises(ConfigError, match=problem):
        Guardrails(guardrails, level)


def test_a_metric_may_have_a_margin_and_a_limit():
    limit = Guardrail(metric="ttft", quantile=0.9, limit=0.9)
    assert canary((TTFT, limit)).decide() == "promote"
    assert canary((TTFT, limit), ttft=1.2).judge().action in ("wait", "promote")
