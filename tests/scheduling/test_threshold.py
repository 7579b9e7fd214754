"""When a request is worth splitting."""

from __future__ import annotations

import pytest

from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.threshold import Threshold
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

PREFILL = Worker("p", "http://127.0.0.1:9001", "vllm", Role.PREFILL)
FLEET = FleetView((PREFILL,), {})


def decide(prompt_tokens, fleet=FLEET, **profile):
    rule = Threshold()
    rule.disagg_on_start(
        Policy.model_validate(
            {
                "fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]},
                "scheduler": {"split": {"min_prompt_tokens": 100}},
            }
        )
    )
    request = RequestProfile("r", "/v1/completions", "m", prompt_tokens, **profile)
    return rule.disagg_select_split(request, fleet)


@pytest.mark.parametrize(("prompt_tokens", "split"), [(0, False), (99, False), (100, True)])
def test_splits_from_the_threshold_of_the_policy_on(prompt_tokens, split):
    decision = decide(prompt_tokens)
    assert decision.split is split
    assert str(prompt_tokens) in decision.reason
    assert "100" in decision.reason


def test_tells_an_estimate_from_a_count():
    assert "about 500" in decide(500).reason
    assert "about" not in decide(500, prompt_tokens_exact=True).reason


def test_keeps_what_cannot_be_split_whole_and_says_why():
    decision = decide(500, unsplittable="n is 4")
    assert not decision.split
    assert "n is 4" in decision.reason


def test_keeps_requests_local_without_a_healthy_prefill_worker():
    sick = FleetView((PREFILL,), {"p": WorkerLoad(healthy=False)})
    assert decide(500, sick) == decide(500, FleetView((), {}))
    assert "no healthy prefill worker" in decide(500, sick).reason
