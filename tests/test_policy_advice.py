"""What the parts of a policy mean together."""

from __future__ import annotations

import pytest

from disagg_plugins.policy import Policy
from disagg_plugins.policy_advice import (
    advice,
    can_split,
    contradictions,
    engine_advice,
    explain,
)
from disagg_sglang.dialect import SglangDialect
from disagg_vllm.dialect import VllmDialect

P = {"name": "p", "url": "http://127.0.0.1:9001", "role": "prefill"}
D = {"name": "d", "url": "http://127.0.0.1:9002", "role": "decode"}
B = {"name": "b", "url": "http://127.0.0.1:9003", "role": "both"}


def policy(*workers, **sections):
    return Policy.model_validate({"fleet": {"workers": list(workers)}, **sections})


@pytest.fixture
def warned(monkeypatch, tmp_path):
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
    return lambda *workers, **sections: "\n".join(advice(policy(*workers, **sections), tmp_path))


@pytest.mark.parametrize(
    ("workers", "possible"),
    [([P, D], True), ([P, B], True), ([B, D], True), ([D], False), ([B], False)],
)
def test_a_split_needs_two_workers(workers, possible):
    assert can_split(policy(*workers)) is possible


def test_a_fleet_that_cannot_split_is_warned_of(warned):
    assert "no request will be split" in warned(D)
    assert "nothing is split" in warned(B)


def test_a_fleet_that_is_not_meant_to_split_is_not_warned_of(warned):
    never = {"split": {"rule": "never"}}
    assert warned(B, scheduler=never) == warned(D, scheduler=never) == ""


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"gateway": {"host": "0.0.0.0"}}, "gateway.host is 0.0.0.0"),
        ({"handoff": {"listen_host": "10.0.0.1"}}, "nothing is encrypted"),
        ({"handoff": {"ticket_s": 5}}, "void ticket"),
    ],
)
def test_risky_settings_are_warned_of(warned, section, words):
    assert words in warned(P, D, **section)


def test_two_models_in_one_fleet_are_warned_of(warned):
    text = warned({**P, "launch": {"model": "m1"}}, {**D, "launch": {"model": "m2"}})
    assert "m1, m2" in text


def test_a_policy_is_explained_in_words():
    text = explain(
        policy(
            {**P, "launch": {"model": "m1", "cpus": [0, 1]}},
            D,
            scheduler={"split": {"min_prompt_tokens": 300}, "weights": {"mine": 2}},
            plugins={"disabled": ["other"]},
            secret={"file": "secret.txt"},
        )
    )
    for words in (
        "127.0.0.1:8000",
        "Worker p (vllm at http://127.0.0.1:9001) reads prompts",
        "starts it with m1 on CPUs 0, 1",
        "at least 300 tokens",
        "shm, else tcp",
        "512 MiB",
        "file secret.txt",
        "Scores weigh: least-loaded 1, mine 2, of any other package 1.",
        "Not loaded: other",
        "50 ms a call",
    ):
        assert words in text, words
    assert "No request is split" in explain(policy(D))


def test_how_a_fleet_changes_is_told():
    text = explain(
        policy(
            B,
            D,
            fleet={"workers": [B, D], "watch": "more.yaml"},
            scheduler={"rebalance": {"enabled": True}},
        )
    )
    assert "More workers stand in more.yaml" in text
    assert "moves to a role that is used to 80% from one that is used to 40% or less" in text
    assert "is asked for one token and has 20 s for it" in text
    assert "gets one request at a time until one succeeds" in text


def test_of_a_fleet_whose_changes_are_off_nothing_is_told():
    text = explain(policy(B, D, gateway={"probe_generate_s": None}))
    assert "one token" not in text
    assert "More workers" not in text
    assert "moves to a role" not in text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("threshold", "at least 256 tokens"),
        ("always", "Every request that can be split is split"),
        ("never", "scheduler.split.rule is never"),
        ("load", "a handoff counts as 256 tokens"),
        ("slo", "predicted TTFT and TPOT"),
    ],
)
def test_every_split_rule_is_explained(rule, words):
    assert words in explain(policy(P, D, scheduler={"split": {"rule": rule}}))


def test_slo_classes_and_the_profile_are_explained():
    rules = {
        "slo_classes": {"chat": {"ttft_s": 0.5, "tpot_s": 0.04, "priority": 5}, "batch": {}},
        "default_slo_class": "batch",
        "profile": "profile.yaml",
    }
    text = explain(policy(P, D, scheduler=rules))
    assert "SLO class chat: TTFT 0.5 s, TPOT 40 ms, priority 5." in text
    assert "SLO class batch: any TTFT, any TPOT, priority 0." in text
    assert "names no class is of class batch" in text
    assert "start from the profile profile.yaml" in text


@pytest.mark.parametrize(
    ("gateway", "words"),
    [
        ({}, "another worker of the same engine from the tokens already sent, at most 2 times"),
        ({"resumes": 1, "idle_s": 9.0}, "says nothing for 9 s, goes on"),
        ({"resumes": 1}, "already sent, once; where that cannot be done it breaks off"),
        ({"resume": False}, "whose decode worker dies breaks off with an error event"),
        ({"resumes": 0}, "whose decode worker dies breaks off with an error event"),
    ],
)
def test_what_happens_when_decode_dies_inside_an_answer_is_explained(gateway, words):
    assert words in explain(policy(P, D, gateway=gateway))


def test_the_slo_rule_without_classes_is_warned_of(warned):
    assert "no scheduler.slo_classes" in warned(P, D, scheduler={"split": {"rule": "slo"}})


def test_a_default_class_that_does_not_exist_cannot_work():
    rules = {"slo_classes": {"chat": {}}, "default_slo_class": "gold"}
    [(path, problem)] = contradictions(policy(P, D, scheduler=rules))
    assert path == ("scheduler", "default_slo_class")
    assert "gold is none of" in problem


def test_the_queue_and_the_tenants_are_explained():
    tenants = {
        "*": {"max_requests": 8, "prompt_tokens_per_s": 500},
        "gold": {"weight": 4, "priority": 2},
    }
    rules = {
        "queue": {"prefills_per_worker": 3, "order": "shortest", "max_wait_s": 4},
        "tenants": tenants,
        "admission": {"refuse_over": 1.5},
    }
    text = explain(policy(P, D, scheduler=rules))
    for words in (
        "reads 3 at once",
        "wait at most 4 s, the shortest prompt first; who has waited 1 s goes before",
        "Each other tenant may have 8 requests at once and 500 prompt tokens a second",
        "Tenant gold has no limit, weight 4, priority +2",
        "over 1.5 times its SLO class's",
    ):
        assert words in text, words
    off = explain(policy(P, D, scheduler={"queue": {"max_waiting": 0}}))
    assert "nobody waits" in off
    assert "requests wait" not in explain(policy(D))


@pytest.mark.parametrize(("order", "warns"), [("shortest", True), ("fifo", False)])
def test_ageing_that_never_comes_is_warned_of(warned, order, warns):
    queue = {"order": order, "ageing_s": 5, "max_wait_s": 5}
    assert ("nobody waits long enough" in warned(P, D, scheduler={"queue": queue})) is warns


DIALECTS = {"vllm": VllmDialect(), "sglang": SglangDialect()}
SP, SD, SB = ({**worker, "engine": "sglang"} for worker in (P, D, B))


class Rigid(SglangDialect):
    """An engine whose servers have the role they were started with."""

    def role_switch(self, role):
        return None


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([P, D, {**B, "role_switch": True}], "role_switch of worker b has no effect"),
        ([SP, SD], "no worker can serve a whole request: decode workers of sglang only"),
        ([P, SD], "no worker can serve a whole request"),
        ([SP, SD, {**SB, "role_switch": True}], "add a worker of role both without role_switch"),
        ([P, D], ""),
        ([SP, SD, SB], ""),
        ([SP, SD, {**B, "role": "decode"}], ""),
        ([SP, {**SD, "engine": "unknown"}], ""),
    ],
)
def test_what_engines_make_of_roles_is_warned_of(workers, words):
    told = "\n".join(engine_advice(policy(*workers), DIALECTS))
    assert words in told
    assert bool(words) is bool(told)


def test_a_role_switch_that_no_server_understands_is_warned_of():
    found = list(engine_advice(policy(SP, SD, {**SB, "role_switch": True}), {"sglang": Rigid()}))
    assert "no server of sglang can be told its role" in found[0]


def test_whole_requests_may_go_to_workers_of_a_watched_file():
    watched = Policy.model_validate({"fleet": {"workers": [SP, SD], "watch": "more.yaml"}})
    assert list(engine_advice(watched, DIALECTS)) == []


def test_slow_workers_are_explained():
    text = explain(policy(P, D, gateway={"slow_factor": 3}))
    assert "A worker over 3 times slower than its load explains" in text
    assert "slower than" not in explain(policy(P, D, gateway={"slow_factor": None}))


@pytest.mark.parametrize("factor", [1, 0, -5])
def test_a_factor_that_makes_every_worker_slow_is_refused(factor):
    with pytest.raises(ValueError, match="greater than 1"):
        policy(P, D, gateway={"slow_factor": factor})


def test_goodput_that_no_request_has_is_warned_of(warned):
    canary = {"candidate": "c.yaml", "guardrails": [{"metric": "goodput", "slack": 0.1}]}
    words = "only requests that name an SLO class have one"
    assert words in warned(B, canary=canary)
    classes = {"slo_classes": {"chat": {"ttft_s": 1.0}}, "default_slo_class": "chat"}
    assert words not in warned(B, canary=canary, scheduler=classes)
