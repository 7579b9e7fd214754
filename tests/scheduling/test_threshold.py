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


DECODES = tuple(Worker(n, f"http://127.0.0.1/{n}", "vllm", Role.DECODE) for n in ("d0", "d1"))


@pytest.mark.parametrize(
    ("cached", "split", "told"),
    [
        ({"d0": 450}, False, "about 500 less 450 that a decode worker holds, so 50 prompt tokens"),
        ({"d0": 100, "d1": 300}, True, "less 300"),
        ({"p": 450}, True, "about 500 prompt tokens, at least 100"),  # no decode worker
        ({"gone": 450}, True, "about 500 prompt tokens, at least 100"),
        ({"d0": 9000}, False, "so 0 prompt tokens"),
    ],
)
def test_what_a_decode_worker_holds_already_does_not_count(cached, split, told):
    decision = decide(500, FleetView((PREFILL, *DECODES), {}), cached_tokens=cached)
    assert decision.split is split
    assert told in decision.reason


def test_what_a_sick_worker_holds_counts():
    fleet = FleetView((PREFILL, *DECODES), {"d0": WorkerLoad(healthy=False)})
    assert decide(500, fleet, cached_tokens={"d0": 450}).split
