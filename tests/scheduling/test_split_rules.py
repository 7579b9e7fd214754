"""The rules without predictions, as tables of decisions; one of them is asked."""

from __future__ import annotations

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import SPLIT_RULES, Policy
from disagg_plugins.scheduling.always import Always
from disagg_plugins.scheduling.candidates import Candidates
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.scheduling.load_rule import LoadRule
from disagg_plugins.scheduling.never import Never
from disagg_plugins.types import (
    FleetView,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
    WorkerLoad,
)

P = Worker("p0", "http://127.0.0.1:1", "vllm", Role.PREFILL)
D = Worker("d0", "http://127.0.0.1:2", "vllm", Role.DECODE)
BUSY = WorkerLoad(requests=12)


def request(prompt_tokens=1000, **more):
    return RequestProfile("r", "/v1/completions", "m", prompt_tokens, **more)


def fleet(p=None, d=None, workers=(P, D)):
    return FleetView(workers, {"p0": p or WorkerLoad(), "d0": d or WorkerLoad()})


def policy(**scheduler):
    workers = [
        {"name": "p0", "url": "http://127.0.0.1:1", "role": "prefill"},
        {"name": "d0", "url": "http://127.0.0.1:2", "role": "decode"},
    ]
    return Policy.model_validate({"fleet": {"workers": workers}, "scheduler": scheduler})


def test_always_splits_whatever_a_prefill_worker_is_there_for():
    assert Always().disagg_select_split(request(1), fleet()).split is True
    assert Always().disagg_select_split(request(1), fleet(WorkerLoad(healthy=False))).split is False
    assert Always().disagg_select_split(request(1, unsplittable="n > 1"), fleet()).split is False


def test_never_splits_nothing():
    assert Never().disagg_select_split(request(100_000)).split is False


# Idle: 256 (handoff) + queue + prompt against queue + prompt. With 12 answers a decode worker reads
# 500 tokens a step without harm where an idle one reads 2048: its tokens count about fourfold.
@pytest.mark.parametrize(
    ("prompt_tokens", "p", "d", "split", "numbers"),
    [
        pytest.param(10_000, None, None, False, (10_256, 10_000), id="idle decode worker"),
        pytest.param(1000, None, BUSY, True, (1256, 4096), id="answers there"),
        pytest.param(50, None, BUSY, False, (306, 204), id="short prompt"),
        pytest.param(
            1000, WorkerLoad(9, 9000), BUSY, False, (10_256, 4096), id="prefill queue too long"
        ),
        pytest.param(
            1000, None, WorkerLoad(2, 3000, prefills=2), True, (1256, 4000), id="decode queue"
        ),
        pytest.param(
            100, None, WorkerLoad(2000), True, (356, 6400), id="full of answers: least slack"
        ),
    ],
)
def test_load_weighs_the_prefill_queue_against_decode_slack(prompt_tokens, p, d, split, numbers):
    decision = LoadRule().disagg_select_split(request(prompt_tokens), fleet(p, d))
    assert decision.split is split, decision.reason
    assert all(str(number) in decision.reason for number in numbers)


def test_load_reads_only_what_a_worker_does_not_hold():
    known = request(1000, cached_tokens={"d0": 990})
    assert LoadRule().disagg_select_split(known, fleet(None, BUSY)).split is False


def test_load_looks_at_the_workers_that_can():
    sick = fleet(WorkerLoad(healthy=False), BUSY)
    assert "no healthy prefill" in LoadRule().disagg_select_split(request(), sick).reason
    dependent = Worker("d0", D.url, "sglang", Role.DECODE, whole=False)
    assert LoadRule().disagg_select_split(request(1), fleet(workers=(P, dependent))).split is True


def test_every_rule_says_why_a_request_cannot_be_split():
    for rule in (Always(), LoadRule()):
        reason = rule.disagg_select_split(request(unsplittable="n > 1"), fleet()).reason
        assert reason == "cannot be split: n > 1"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("threshold", "prompt tokens, at least"),
        ("always", "always splits"),
        ("never", "never splits"),
        ("load", "staying local: a prefill worker"),
        ("slo", "not measured yet"),
    ],
)
def test_the_rule_of_the_policy_is_asked_and_no_other(rule, words):
    with PluginHost.load(entry_points=False) as host:
        decider = Scheduler(host, policy(split={"rule": rule}))
        assert words in decider.decide(request(), fleet()).reason


def test_a_third_party_rule_is_asked_first_whatever_the_policy_names():
    class Mine:
        @hookimpl
        def disagg_select_split(self):
            return SplitDecision(False, "mine says so")

    with PluginHost.load(entry_points=False, extra=[("mine", Mine())]) as host:
        decider = Scheduler(host, policy(split={"rule": "always"}))
        assert decider.decide(request(), fleet()).reason == "mine says so"


def test_every_rule_is_a_built_in_plugin():
    with PluginHost.load(entry_points=False) as host:
        deciding = {i.name for i in host.describe() if "disagg_select_split" in i.hooks}
    assert deciding == set(SPLIT_RULES)


def test_the_rules_of_a_host_decide_by_what_its_learning_plugin_was_told():
    with PluginHost.load(entry_points=False) as one, PluginHost.load(entry_points=False) as two:
        learning, slo = (one._manager.get_plugin(name) for name in ("prediction", "slo"))
        assert learning.predictor is slo.predictor
        assert two._manager.get_plugin("slo").predictor is not slo.predictor


def test_candidates_take_turns_and_are_bounded():
    workers = [Worker(f"w{n}", "http://127.0.0.1:1", "vllm", Role.BOTH) for n in range(100)]
    looks = [Candidates(8).of(workers), *(c.of(workers) for c in [Candidates(8)] * 20)]
    assert all(len(look) == 8 == len({w.name for w in look}) for look in looks)
    assert len({w.name for look in looks for w in look}) == 100
    assert Candidates(8).of(workers[:8]) == workers[:8]
