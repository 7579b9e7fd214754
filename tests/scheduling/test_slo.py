"""Predicted TTFT and TPOT decide: a table of decisions, and a fleet under load."""

from __future__ import annotations

import pytest

from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.slo import Slo
from disagg_plugins.scheduling.slo_choices import Bounds, Choice
from disagg_plugins.types import FleetIndex, FleetView, RequestProfile, Role, Worker, WorkerLoad
from tests.scheduling import queueing as q

P, D = q.P0, q.D0
BUSY = WorkerLoad(requests=20, output_tokens=20 * 200, kv_tokens=20_000)
CHAT = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.04}


def slo_rule(*, seeded=True):
    rule = Slo()
    for each in (P, D):
        rule.predictor.know(each)
    if seeded:
        for phase, known in (("prefill", q.PREFILL), ("decode", q.DECODE), ("handoff", q.HANDOFF)):
            rule.predictor.seed_kind(("vllm", ""), phase, known)
    return rule


def decide(prompt_tokens, p=None, d=None, workers=(P, D), rule=None, pairs=None, **profile):
    fleet = FleetView(workers, {"p0": p or WorkerLoad(), "d0": d or WorkerLoad()}, pairs or {})
    request = RequestProfile("r", "/v1/completions", "m", prompt_tokens, **profile)
    return (rule or slo_rule()).disagg_select_split(request, fleet)


@pytest.mark.parametrize(
    ("prompt_tokens", "p", "d", "split"),
    [
        pytest.param(1000, None, None, False, id="both idle: the handoff is saved"),
        pytest.param(3500, None, BUSY, True, id="a long prompt among answers"),
        pytest.param(64, None, BUSY, True, id="free prefill worker, answers to spare"),
        pytest.param(200, WorkerLoad(20, 20_000), BUSY, False, id="prefill worker far behind"),
        pytest.param(200, WorkerLoad(1, 500), None, False, id="idle decode worker"),
    ],
)
def test_the_choice_that_keeps_the_slo_is_taken(prompt_tokens, p, d, split):
    assert decide(prompt_tokens, p, d, max_output_tokens=200, **CHAT).split is split


def test_the_reason_tells_the_numbers_of_both_choices_and_the_slo():
    reason = decide(3500, None, BUSY, max_output_tokens=200, **CHAT).reason
    assert reason == (
        "splitting: TTFT 0.44 s against 0.42 s local, TPOT 35.5 ms against 37.2 ms, "
        "SLO 0.50 s / 40 ms"
    )


def test_where_neither_keeps_the_slo_the_reason_says_so():
    assert decide(4000, None, BUSY, ttft_slo_s=0.001).reason.endswith("; neither keeps it")


def test_without_an_slo_the_time_of_all_who_are_concerned_decides():
    assert decide(1000).split is False
    decision = decide(1000, None, BUSY)
    assert decision.split is True
    assert decision.reason.endswith("; no SLO")


def test_one_bound_is_enough():
    decision = decide(4000, None, BUSY, tpot_slo_s=0.036)
    assert decision.split is True
    assert ", SLO any / 36 ms" in decision.reason


def test_what_a_decode_worker_holds_is_not_read_again():
    assert decide(4000, None, BUSY, cached_tokens={"d0": 3990}, **CHAT).split is False


def test_before_anything_is_measured_the_prompt_length_decides():
    unmeasured = slo_rule(seeded=False)
    decision = decide(1000, rule=unmeasured)
    assert decision.split is True
    assert decision.reason.startswith("not measured yet: about 1000 prompt tokens")
    assert decide(10, rule=unmeasured).split is False


def test_a_full_prefill_worker_takes_nothing():
    small = Worker("p0", P.url, "vllm", Role.PREFILL, capacity=2)
    decision = decide(4000, WorkerLoad(2), BUSY, workers=(small, D))
    assert decision.reason == "no prefill worker with room"


def test_no_prefill_worker_no_split():
    assert decide(4000, workers=(D,)).reason == "no prefill worker that is healthy"


def test_first_tokens_that_are_on_their_way_to_a_worker_count_against_reading_there():
    bounds = {"ttft_slo_s": 0.3, "max_output_tokens": 14}
    assert decide(1600, WorkerLoad(0, 100), **bounds).split is False
    assert decide(1600, WorkerLoad(9, 100, prefills=9), **bounds).split is True


def test_a_bound_is_kept_with_room_to_spare_where_prefill_workers_write_nothing():
    both = Worker("p0", P.url, "vllm", Role.BOTH, capacity=1000)
    tight = {"tpot_slo_s": 0.0375, "max_output_tokens": 200}  # 37.2 ms if it stays
    behind = WorkerLoad(21, 120_000, output_tokens=21 * 200, kv_tokens=20_000, prefills=1)
    assert decide(3500, behind, BUSY, **tight).split is True
    assert decide(3500, behind, BUSY, workers=(both, D), **tight).split is False


def test_workers_that_cannot_share_a_handoff_are_no_pair():
    decision = decide(4000, None, BUSY, pairs={("p0", "d0"): "models differ"})
    assert decision.reason.startswith("not measured yet")


def test_another_decode_worker_is_looked_at_where_the_fastest_has_no_partner():
    slower = Worker("d1", D.url, "vllm", Role.DECODE)
    fleet = FleetView((P, D, slower), {"d1": BUSY, "d0": BUSY}, {("p0", "d0"): "models differ"})
    request = RequestProfile("r", "/v1/completions", "m", 4000, **CHAT)
    decision = slo_rule().disagg_select_split(request, fleet)
    assert decision.split is True
    assert decision.reason.startswith("splitting: TTFT")


def test_a_request_that_cannot_be_split_stays_whole():
    assert "n > 1" in decide(4000, None, BUSY, unsplittable="n > 1").reason


def test_what_many_answers_lose_outweighs_what_one_request_gains():
    late = Choice(ttft_s=2.0, step_s=0.03, tpot_s=0.03, disturbed=0, cost_s=1.0)
    harmful = Choice(ttft_s=0.1, step_s=0.03, tpot_s=0.05, disturbed=18, cost_s=1.0)
    assert late.excess(Bounds(1.0, 0.04)) == pytest.approx(1.0)
    assert harmful.excess(Bounds(1.0, 0.04)) == pytest.approx(18 * 0.25)


class Loads(dict):
    """Notes whose load was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return default


def test_a_large_fleet_costs_no_more_than_the_candidates():
    ready = {
        role: [Worker(f"{role}{i}", f"http://127.0.0.1/{i}", "vllm", role) for i in range(500)]
        for role in (Role.PREFILL, Role.DECODE)
    }
    rule, loads = slo_rule(), Loads()
    policy = {
        "fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]},
        "scheduler": {"candidates": 4},
    }
    rule.disagg_on_start(Policy.model_validate(policy))
    fleet = FleetView(
        [*ready[Role.PREFILL], *ready[Role.DECODE]], loads, {}, FleetIndex(ready, {}, {})
    )
    request = RequestProfile("r", "/v1/completions", "m", 4000)
    for _ in range(3):
        loads.asked.clear()
        assert "TTFT" in rule.disagg_select_split(request, fleet).reason
        assert 0 < len(loads.asked) <= 8


@pytest.mark.parametrize(("per_s", "prompt_tokens"), [(8, 500), (12, 400)])
@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "learning"])
def test_more_requests_keep_their_slo_than_when_all_or_none_are_split(per_s, prompt_tokens, seeded):
    bounds = (1.0, 0.05)
    rule = slo_rule(seeded=seeded)

    def share(decides, ended=lambda record: None):
        arrivals = q.jobs(5, 400, per_s, prompt_tokens)
        q.run(decides, arrivals, *bounds, ended=ended)
        return q.attained(arrivals, *bounds)

    by_slo = share(
        lambda profile, fleet: rule.disagg_select_split(profile, fleet).split,
        rule.predictor.observe,
    )
    always = share(lambda profile, fleet: True)
    never = share(lambda profile, fleet: False)
    assert by_slo > max(always, never) + 0.03, (by_slo, always, never)
