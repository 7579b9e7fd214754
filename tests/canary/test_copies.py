"""Copies of requests: who gets them, what is compared, and that no client notices."""

from __future__ import annotations

import json

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import eventually

SHADOW = {"share": 1.0, "control": 0.0, "max_per_s": 1000, "timeout_s": 5}


def shadowed(arms, **more):
    shadow = {**SHADOW, **more.pop("shadow", {})}
    return arms(canary={"shadow": shadow}, **more)


def test_each_request_is_answered_by_the_baseline_and_copied_to_the_candidate(arms) -> None:
    site = shadowed(arms)
    for stream in (False, True):
        status, body = site.complete("hello", stream=stream, temperature=0)
        assert status == 200
        assert b"[DONE]" in body or not stream
    eventually(lambda: site.front.copies.pairs == 2, "2 pairs")
    assert site.front.copies.copied == {"candidate": 2}
    assert site.document()["shadow"]["pairs"] == 2
    eventually(lambda: len(site.front.copies._sent) == 0, "nothing in flight")


def test_greedy_answers_are_compared_and_sampled_ones_are_not(arms) -> None:
    site = shadowed(arms, shadow={"control": 0.5})
    for _ in range(20):
        site.complete("hello", temperature=0)
        site.complete("hello", temperature=1)
    eventually(lambda: site.front.copies.pairs == 40, "40 pairs")

    def counted():
        return sum(site.document()["parity"]["pairs"].values())

    eventually(lambda: counted() == 20, "20 compared")
    findings = site.document()["parity"]["findings"]
    assert {f["answer"] for f in findings} <= {"open", "ok"}


def test_a_candidate_that_answers_otherwise_is_rolled_back(arms) -> None:
    # the pretend engine answers with words of its behaviour's count: fewer tokens is another answer
    site = shadowed(
        arms,
        shadow={"control": 0.5, "parity": {"min_pairs": 10}},
        behaviours={"c0": Behaviour(tokens=2)},
    )
    site.command("start")
    site.wait_weight(50)

    def rolled_back():
        for _ in range(20):
            assert site.complete("hello", temperature=0, max_tokens=8)[0] == 200
        return site.front.lookout.view.progress.phase == "rolled_back"

    eventually(rolled_back, "rolled back", 30)
    assert "parity" in site.document()["decisions"][0]["why"][0]


def test_a_copy_that_hangs_slows_nobody_and_is_given_up(arms) -> None:
    site = shadowed(arms, behaviours={"c0": Behaviour(hang="head")}, shadow={"timeout_s": 0.5})
    assert site.complete("hello", temperature=0)[0] == 200
    eventually(lambda: site.metric("disagg_shadow_lost") == 1, "given up")
    eventually(lambda: not site.front.candidate.active, "nothing is left of it")
    assert not site.front.copies._sent


def test_copies_carry_no_secret_of_the_client(arms) -> None:
    site = shadowed(arms, shadow={"headers": ["x-team"]})
    body = {"model": "fake-model", "prompt": "hello", "temperature": 0, "max_tokens": 2}
    headers = {"Authorization": "Bearer sk-very-secret", "X-Team": "blue", "Cookie": "a=b"}
    assert site.request("POST", "/v1/completions", body, headers)[0] == 200
    eventually(lambda: site.front.copies.pairs == 1, "a pair")
    told = json.dumps([str(headers) for headers in site.engines["c0"].seen.headers])
    assert "secret" not in told
    assert "a=b" not in told
    assert "blue" in told


def test_what_has_effects_is_not_copied(arms) -> None:
    site = shadowed(arms)
    site.complete("hello", temperature=0, store=True)
    assert site.front.copies.shadow.skipped == {"side effects": 1}
    assert not site.front.copies.copied


def test_copies_end_with_the_gateway(arms) -> None:
    site = shadowed(arms, behaviours={"c0": Behaviour(hang="head")})
    site.complete("hello", temperature=0)
    eventually(lambda: site.front.candidate.active, "in flight")
    site.stop()
    assert not site.front.candidate.active
