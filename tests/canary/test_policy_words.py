"""The canary in words, and what of it is likely not meant."""

from __future__ import annotations

import pytest

from disagg_plugins.canary.policy import CanaryPolicy
from disagg_plugins.canary.policy_words import canary_advice, canary_sentences


def canary(**fields):
    return CanaryPolicy.model_validate({"candidate": "candidate.yaml", **fields})


@pytest.fixture
def warned(tmp_path):
    (tmp_path / "candidate.yaml").touch()
    return lambda **fields: "\n".join(canary_advice(canary(**fields), tmp_path))


def test_the_defaults_are_as_meant(warned):
    assert warned() == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"candidate": "nowhere.yaml"}, "there is no file"),
        ({"guardrails": [{"metric": "error_rate"}]}, "has a limit"),
        ({"steps": [60, 100]}, "begins at 60 %"),
        ({"bake_s": 1}, "first look"),
        ({"store": {"postgres": {"env": "NO_SUCH_DSN"}}}, "NO_SUCH_DSN is not set"),
    ],
)
def test_what_is_likely_not_meant_is_warned_of(warned, fields, words):
    assert words in warned(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "1 %, 5 %, 25 %, 50 %, 100 %, at least 600 s each; the evidence alone decides"),
        ({}, "with a chance of at most 0.05"),
        ({}, "The candidate's ttft p95 may be at most 1.25 x the baseline's; a step waits"),
        ({}, "The candidate's error_rate may be at most 0.05; it only rolls back."),
        ({}, "remembered in canary.sqlite"),
        ({}, "All requests of a session go to one arm"),
        ({"approval": "manual"}, "a person approves"),
        ({"sticky": "request"}, "by itself"),
        (
            {"freeze": [{"days": ["fri"], "begin": "18:00"}]},
            "Nothing is promoted on fri from 18:00 to 24:00 (UTC); rollback still works.",
        ),
        ({"store": {"postgres": {"env": "DSN"}}}, "environment variable DSN names"),
        ({"store": {"postgres": {"file": "dsn"}}}, "that the file dsn names"),
        (
            {"rules": [{"model": "m", "header": {"name": "a", "value": "b"}, "arm": "candidate"}]},
            "Requests for model m with the header a: b go to the candidate",
        ),
        ({"rules": [{"tenant": "t", "arm": "baseline"}]}, "Requests of tenant t go to the bas"),
        ({"shadow": {"share": 0.1}}, "Copies of 0.1 of the baseline's requests"),
        ({"shadow": {"share": 0.1}}, "may be different in 3 % more of the cases"),
        ({"shadow": {"share": 0.1, "control": 0}}, "nobody knows whether both say the same"),
    ],
)
def test_each_fact_is_told(fields, words):
    assert words in "\n".join(canary_sentences(canary(**fields)))
