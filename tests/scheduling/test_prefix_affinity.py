"""Prefer who holds the prompt's beginning."""

from __future__ import annotations

from disagg_plugins.scheduling.prefix_affinity import PrefixAffinity
from disagg_plugins.types import RequestProfile, Role, Worker

A, B, C = (Worker(n, f"http://127.0.0.1:{i}", "vllm", Role.BOTH) for i, n in enumerate("abc", 1))
CACHED = {"b": 400, "c": 100, "d": 64}
PROFILE = RequestProfile("r", "/v1/completions", "m", 400, cached_tokens=CACHED)
NOTHING = RequestProfile("r", "/v1/completions", "m", 400)


def test_the_score_is_the_share_of_the_prompt_that_is_held():
    assert PrefixAffinity().disagg_score_workers(PROFILE, [A, B, C]) == {
        "a": 0.0,
        "b": 1.0,
        "c": 0.25,
    }


def test_nothing_held_is_no_opinion():
    assert PrefixAffinity().disagg_score_workers(NOTHING, [A, B]) is None
    assert PrefixAffinity().disagg_nominate_workers(NOTHING) is None


def test_the_best_two_holders_are_nominated():
    assert PrefixAffinity().disagg_nominate_workers(PROFILE) == ["b", "c"]
