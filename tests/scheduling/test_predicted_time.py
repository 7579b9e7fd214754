"""The worker that is done first is preferred, as far as times are known."""

from __future__ import annotations

import pytest

from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.scheduling.predicted_time import PredictedTime
from disagg_plugins.scheduling.weights import weights_of
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

PREFILL = (0.01, 1e-4, 0.0, 1e-4, 0.0)
DECODE = (0.02, 1e-3, 0.0, 0.0)


def worker(name, role=Role.PREFILL):
    return Worker(name, f"http://127.0.0.1/{name}", "vllm", role)


A, B, D = worker("a"), worker("b"), worker("d", Role.DECODE)


def request(tokens=1000, **more):
    return RequestProfile("r", "/v1/completions", "m", tokens, max_output_tokens=100, **more)


def scorer(*known):
    made = PredictedTime()
    for each in known:
        made.predictor.seed_worker(each.name, "prefill", PREFILL)
        made.predictor.seed_worker(each.name, "decode", DECODE)
    return made


def scores(made, profile, role=Role.PREFILL, **loads):
    return made.disagg_score_workers(profile, role, [A, B], FleetView((A, B), loads))


def test_nobody_is_preferred_before_all_are_measured():
    assert scores(scorer(A), request()) is None


def test_equal_workers_score_alike():
    assert scores(scorer(A, B), request()) == {"a": 1.0, "b": 1.0}


def test_a_queue_counts_as_the_time_that_it_takes():
    found = scores(scorer(A, B), request(), a=WorkerLoad(prompt_tokens=1100))
    assert found == {"a": pytest.approx(0.5), "b": 1.0}


def test_what_a_worker_holds_needs_no_reading():
    found = scores(scorer(A, B), request(cached_tokens={"a": 900}))
    assert found == {"a": 1.0, "b": pytest.approx(0.02 / 0.11)}


def test_for_decode_the_answers_beside_it_and_the_reading_count():
    found = scores(scorer(A, B), request(), Role.DECODE, b=WorkerLoad(requests=20))
    assert found == {"a": 1.0, "b": pytest.approx((2.1 + 0.11) / (4.1 + 0.11))}


def policy(**scheduler):
    workers = [{"name": "w", "url": "http://127.0.0.1:1", "role": "both"}]
    return Policy.model_validate({"fleet": {"workers": workers}, "scheduler": scheduler})


def test_it_counts_only_with_the_rule_that_predicts_unless_the_policy_says_otherwise():
    assert weights_of(policy().scheduler)["predicted-time"] == 0.0
    assert weights_of(policy(split={"rule": "slo"}).scheduler)["predicted-time"] == 1.0
    asked = policy(split={"rule": "slo"}, weights={"predicted-time": 0.0}).scheduler
    assert weights_of(asked)["predicted-time"] == 0.0


def test_the_worker_that_the_rule_predicts_with_is_the_one_that_is_taken():
    loads = {"a": WorkerLoad(requests=1, prompt_tokens=100), "b": WorkerLoad(requests=2)}
    with PluginHost.load((), entry_points=False) as host:
        scheduler = Scheduler(host, policy(split={"rule": "slo"}))
        for _ in range(40):
            for name in ("a", "b"):
                scheduler.request_ended(ended(name))
        profile = request(3000, cached_tokens={"b": 2900})
        route = scheduler.decide(profile, FleetView((A, B, D), loads)).route
    assert route.prefill.name == "b"  # it has more requests, but holds the prompt


def ended(prefill):
    return {
        "outcome": "ok", "stream": True, "route": "disaggregated", "split": "yes",
        "prefill": prefill, "decode": "d", "prompt_tokens_estimate": 1000, "prompt_tokens": 1000,
        "output_tokens": 100, "sent_s": 0.0, "prefill_s": 0.1, "ttft_s": 0.11, "tpot_s": 0.02,
        "decode_requests": 1, "decode_kv_tokens": 1000,
    }  # fmt: skip
