"""Guardrails and parity together: one level, one verdict."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.canary.answer import Answer, compare
from disagg_plugins.canary.case import Compared, Terms
from disagg_plugins.canary.guardrail import Guardrail
from disagg_plugins.canary.metrics import Outcome
from disagg_plugins.canary.policy import ParityPolicy
from disagg_plugins.errors import DamagedState

GUARDRAILS = (Guardrail(metric="error_rate", slack=0.3, min_samples=10),)
ALLOWED = ParityPolicy(min_pairs=5, prompt_tokens=[]).allowed()
TERMS = Terms(GUARDRAILS, 0.05, ALLOWED)
SAME = compare(Answer("yes"), Answer("yes"), tie_gap=0.1)
OTHER = compare(Answer("yes"), Answer("no"), tie_gap=0.1)


def judged(pairs: int, candidate, case=None):
    case = case or TERMS.empty()
    for _ in range(pairs):
        case.observe(Compared("baseline", 100, SAME))
        case.observe(Compared("candidate", 100, candidate))
    return case


def outcomes(case, count: int):
    for number in range(count):
        for arm in ("baseline", "candidate"):
            case.observe(Outcome(arm, float(number), "ok"))
    return case


def test_answers_that_differ_condemn_whatever_the_guardrails_say() -> None:
    case = outcomes(judged(60, OTHER), 200)
    assert case.decide() == "rollback"
    judgement, parity = case.judge()
    assert judgement.action == "rollback"
    assert parity.answer == "worse"
    assert "parity" in judgement.reasons[0]


def test_a_step_waits_until_answers_were_compared() -> None:
    case = outcomes(TERMS.empty(), 200)
    assert case.decide() == "wait"
    assert "no two answers were compared yet" in case.judge()[0].reasons[0]
    judged(4, SAME, case)
    assert case.decide() == "wait"
    judgement, _ = case.judge()
    assert judgement.action == "wait"
    assert "4 pairs with the candidate" in judgement.reasons[0]


def test_a_step_does_not_wait_for_a_proof_that_answers_are_alike() -> None:
    case = outcomes(judged(5, SAME), 200)
    assert case.judge()[1].answer == "open"
    assert case.judge()[0].action == case.decide() == "promote"


def test_answers_that_differ_too_often_hold_a_step_before_they_condemn() -> None:
    case = outcomes(judged(2, OTHER, judged(5, SAME)), 200)
    judgement, parity = case.judge()
    assert parity.answer == "open"
    assert judgement.action == case.decide() == "wait"
    assert judgement.reasons == case.parity.waits_for()
    assert "different in 0.2857 of 7 pairs with the candidate, 0 of 7" in judgement.reasons[0]
    assert judged(200, SAME, case).decide() == "promote"


def rare(candidate, baseline=(), ordinary: int = 200):
    """Return a case of many short prompts that agree, and few long ones."""
    terms = Terms(GUARDRAILS, 0.05, ParityPolicy(min_pairs=5, prompt_tokens=[8_000]).allowed())
    case = outcomes(judged(ordinary, SAME, terms.empty()), 200)
    for arm, differences in (("candidate", candidate), ("baseline", baseline)):
        for difference in differences:
            case.observe(Compared(arm, 9_000, difference))
    return case


@pytest.mark.parametrize("odd", [1, 2])
def test_one_or_two_odd_answers_of_a_rare_length_hold_no_step(odd: int) -> None:
    assert rare([OTHER] * odd, [SAME]).decide() == "promote"


@pytest.mark.parametrize("baseline", [[], [SAME], [SAME] * 4])
def test_a_rare_length_whose_answers_all_differ_holds_a_step(baseline) -> None:
    """Whether or not the baseline was seen there: it is taken to agree with itself."""
    case = rare([OTHER] * 3, baseline)
    assert case.decide() == "wait"
    assert "prompts of 8000 and more tokens: different in 1 of 3" in case.judge()[0].reasons[0]


def test_two_pairs_of_the_baseline_excuse_little_in_a_rare_length() -> None:
    assert rare([OTHER] * 8 + [SAME] * 2, [OTHER, SAME], 1_000).decide() == "wait"


def test_chance_in_a_rare_length_holds_a_step_no_longer_than_it_seems_more() -> None:
    mixed = [OTHER] * 3 + [SAME] * 5
    assert rare(mixed, [SAME] * 8, 1_000).decide() == "wait"
    assert rare(mixed, [OTHER] * 2 + [SAME] * 6, 1_000).decide() == "promote"
    assert rare([*mixed, *[SAME] * 60], [SAME] * 68, 3_000).decide() == "promote"


def test_what_the_baseline_does_to_itself_holds_no_step() -> None:
    case = outcomes(judged(5, SAME), 200)
    for arm in ("baseline", "candidate"):
        case.observe(Compared(arm, 100, OTHER))
    assert case.decide() == "promote"


def test_damage_in_every_answer_condemns_as_soon_as_a_step_could_go_on() -> None:
    policy = ParityPolicy()
    terms = Terms(GUARDRAILS, 0.01, policy.allowed())
    case = terms.empty()
    for _ in range(policy.min_pairs):
        case.observe(Compared("baseline", 100, SAME))
        case.observe(Compared("candidate", 100, OTHER))
    assert case.decide() == "rollback"


def test_guardrails_and_parity_share_one_level() -> None:
    case = TERMS.empty()
    assert case.guardrails.level + case.parity.level == pytest.approx(TERMS.level)
    assert Terms(GUARDRAILS, 0.05).empty().guardrails.level == 0.05


def test_evidence_survives_being_stored_and_merged() -> None:
    case = outcomes(judged(30, OTHER), 20)
    stored = TERMS.load(json.loads(json.dumps(case.as_dict())))
    assert stored.decide() == case.decide() == "rollback"
    merged = TERMS.empty()
    merged.merge(case)
    assert merged.parity.pairs("candidate") == 30


def test_evidence_gathered_with_parity_is_none_without() -> None:
    with pytest.raises(DamagedState):
        Terms(GUARDRAILS, 0.05).load(TERMS.empty().as_dict())


def test_copies_without_an_answer_are_told_and_condemn_nobody() -> None:
    case = outcomes(TERMS.empty(), 200)
    for _ in range(50):
        case.observe(Compared("candidate", 100, None))
    assert case.judge()[1].lost["candidate"] == 50
    judged(5, SAME, case)
    assert case.decide() == "promote"
