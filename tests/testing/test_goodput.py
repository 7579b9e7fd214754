"""The arithmetic of the policy benchmark."""

from __future__ import annotations

import pytest

from tests.benchmarks.goodput import Level, Outcome, level, rate_at
from tests.benchmarks.workloads import Slo, chat, code, summarise, words

SLO = Slo(1.0, 0.1)


@pytest.mark.parametrize(
    ("outcome", "keeps"),
    [
        (Outcome(0.9, 0.05), True),
        (Outcome(1.1, 0.05), False),
        (Outcome(0.9, 0.2), False),
        (Outcome(0.9, None), True),
        (Outcome(None), False),
    ],
)
def test_a_request_counts_when_both_bounds_hold(outcome: Outcome, keeps: bool) -> None:
    assert outcome.keeps(SLO) == keeps


def at(rate: float, share: float) -> Level:
    return Level(rate, share, 0, 1, 0, 0, 0, 0)


def test_the_load_at_ninety_per_cent_lies_between_two_levels() -> None:
    assert rate_at([at(1, 1.0), at(2, 0.8)]) == pytest.approx(1.5)
    assert rate_at([at(2, 0.8), at(4, 0.0)]) == pytest.approx(1.0)
    assert rate_at([at(1, 1.0), at(2, 0.95)]) == 2


def test_a_failed_request_lowers_the_share_and_no_percentile() -> None:
    found = level(1.0, [Outcome(0.5, 0.05), Outcome(None)], SLO)
    assert (found.share, found.failed, found.ttft_p90_s) == (0.5, 1, 0.5)


@pytest.mark.parametrize("make", [chat, summarise, code])
def test_a_workload_is_the_same_for_the_same_seed_and_keeps_its_rate(make: object) -> None:
    assert callable(make)
    asks = make(1, 10.0, 60.0)
    assert asks == make(1, 10.0, 60.0)
    assert len(asks) == pytest.approx(600, rel=0.2)


def test_texts_have_their_length_and_share_their_beginning() -> None:
    assert len(words("a", 100)) == 400
    assert words("a", 100)[:80] == words("a", 20)
