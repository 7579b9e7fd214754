"""A declaration is checked when it is made, and its verdict told in words."""

from __future__ import annotations

import math

import pytest

from disagg_plugins.canary.guardrail import Figure, Guardrail, verdict
from disagg_plugins.errors import ConfigError


@pytest.mark.parametrize(
    ("declared", "name", "allowed"),
    [
        ({"metric": "ttft", "quantile": 0.99, "ratio": 1.3}, "ttft p99",
         "at most 1.3 x the baseline's"),
        ({"metric": "tpot", "quantile": 0.999, "ratio": 0.9}, "tpot p99.9",
         "at most 0.9 x the baseline's"),
        ({"metric": "e2e", "quantile": 0.5, "slack": 0.5}, "e2e p50",
         "at most the baseline's + 0.5 s"),
        ({"metric": "error_rate", "slack": 0.01}, "error_rate", "at most the baseline's + 0.01"),
        ({"metric": "goodput", "ratio": 0.95, "slack": 0.01}, "goodput",
         "at least 0.95 x the baseline's - 0.01"),
        ({"metric": "goodput", "slack": -0.1}, "goodput", "at least the baseline's + 0.1"),
        ({"metric": "kv_failures", "limit": 0.02}, "kv_failures", "at most 0.02"),
        ({"metric": "split_share", "limit": 0.3, "better": "higher"}, "split_share",
         "at least 0.3"),
        ({"metric": "ttft", "quantile": 0.9, "limit": 2}, "ttft p90", "at most 2 s"),
    ],
)  # fmt: skip
def test_a_guardrail_has_a_name_and_says_what_is_allowed(declared, name, allowed):
    guardrail = Guardrail(**declared)
    assert (guardrail.name, guardrail.allowed) == (name, allowed)


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ({"metric": "ttfb"}, "known: "),
        ({"metric": "ttft"}, "name a quantile"),
        ({"metric": "error_rate", "quantile": 0.5}, "it has a mean only"),
        ({"metric": "ttft", "quantile": 1.0}, "no quantile"),
        ({"metric": "ttft", "quantile": math.nan}, "no quantile"),
        ({"metric": "error_rate", "ratio": 0.0}, "ratio"),
        ({"metric": "error_rate", "ratio": math.inf}, "ratio"),
        ({"metric": "error_rate", "ratio": math.nan}, "ratio"),
        ({"metric": "error_rate", "slack": math.inf}, "slack"),
        ({"metric": "error_rate", "limit": -0.1}, "limit"),
        ({"metric": "error_rate", "limit": 0.1, "ratio": 1.1}, "beside ratio or slack"),
        ({"metric": "error_rate", "limit": 0.1, "slack": 0.1}, "beside ratio or slack"),
        ({"metric": "split_share", "limit": 0.1}, "say lower or higher"),
        ({"metric": "error_rate", "min_samples": 0}, "min_samples"),
    ],
)
def test_what_does_not_go_together_is_an_error(declared, problem):
    with pytest.raises(ConfigError, match=problem):
        Guardrail(**declared)


def test_where_higher_is_better_slack_is_still_what_may_be_given():
    assert Guardrail(metric="goodput", slack=0.05).bound.of(0.9) == pytest.approx(0.85)
    assert Guardrail(metric="error_rate", slack=0.05).bound.of(0.01) == pytest.approx(0.06)


def test_a_verdict_tells_the_numbers_of_both_arms_and_what_was_allowed():
    guardrail = Guardrail(metric="ttft", quantile=0.99, ratio=1.3)
    found = verdict(guardrail, "worse", Figure(900, 1.0, 0.9, 1.1), Figure(310, 1.7, 1.5, math.inf))
    assert found.allowed == pytest.approx(1.3)
    assert found.reason == (
        "ttft p99 is worse than allowed: 1.7 s (1.5 to unbounded, 310 requests); "
        "baseline 1 s (0.9 to 1.1, 900 requests); allowed at most 1.3 x the baseline's, about 1.3 s"
    )


def test_requests_that_depend_on_each_other_are_told_in_what_they_are_worth():
    figure = Figure(1_000, 0.1, 0.0, 0.3, 4.0, 1_000)
    assert figure.words("s") == "0.1 s (0 to 0.3, 1000 requests worth 250 independent ones)"


def test_a_fixed_limit_has_no_baseline():
    guardrail = Guardrail(metric="kv_failures", limit=0.02)
    found = verdict(guardrail, "ok", None, Figure(1, 0.0, 0.0, 1.0))
    assert found.reason == (
        "kv_failures is within what is allowed: 0 (0 to 1, 1 request); allowed at most 0.02"
    )


def test_an_open_verdict_says_what_it_lacks():
    guardrail = Guardrail(metric="ttft", quantile=0.99, min_samples=50)
    few = Figure(12, None, 0.0, math.inf, 1.0, 12)
    broken = Figure(500, math.inf, 1e4, math.inf)
    reason = verdict(guardrail, "open", broken, few).reason
    assert "ttft p99 is not decided: no request" in reason
    assert "the candidate has 12 of 50 independent requests needed" in reason
    assert "more than 0.01 of the baseline's requests have no such time" in reason
