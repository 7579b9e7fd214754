"""What is refused at once because its answer could not begin in time."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.scheduling.slo_admission import SloAdmission
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

P1, P2 = (Worker(n, "http://127.0.0.1:1", "vllm", Role.PREFILL) for n in ("p1", "p2"))
D1 = Worker("d1", "http://127.0.0.1:2", "vllm", Role.DECODE)
PROFILE = RequestProfile("r", "/v1/completions", "m", 1000, ttft_slo_s=1.0)


class Linear:
    """A predictor: a millisecond a token, queued or own; ten on decode workers."""

    def __init__(self, known=True):
        self.lock = threading.Lock()
        self.known = known
        self.asked = 0

    def catch_up(self):
        assert self.lock.locked()

    def prefill_s(self, worker, load, tokens, ahead_tokens=0):
        self.asked += 1
        per_s = 1000 if worker.role is Role.PREFILL else 100
        return (load.prompt_tokens + ahead_tokens + tokens) / per_s if self.known else None

    def handoff_s(self, decode, tokens):
        return 0.1


def admission(refuse_over=1.5, predictor=None):
    worker = {"name": "d", "url": "http://127.0.0.1:1", "role": "both"}
    policy = Policy.model_validate(
        {
            "fleet": {"workers": [worker]},
            "scheduler": {"admission": {"refuse_over": refuse_over}},
        }
    )
    plugin = SloAdmission(predictor)
    plugin.disagg_on_start(policy)
    return plugin


def refusal(profile=PROFILE, *, fleet=(P1, P2, D1), predictor=None, refuse_over=1.5, **queued):
    loads = {name: WorkerLoad(prompt_tokens=tokens) for name, tokens in queued.items()}
    plugin = admission(refuse_over, predictor or Linear())
    return plugin.disagg_select_admission(profile, FleetView(fleet, loads))


@pytest.mark.parametrize(
    ("profile", "queued", "expected"),
    [
        ({}, {}, None),
        ({}, {"p1": 9000}, None),
        ({}, {"p1": 9000, "p2": 400}, None),
        ({}, {"p1": 9000, "p2": 500}, (503, 1.0)),  # 1.6 s against 1.5: at least 1 s
        ({}, {"p1": 9000, "p2": 5000}, (503, 4.6)),
        ({"ttft_slo_s": None}, {"p1": 9000, "p2": 5000}, None),
        ({"ttft_slo_s": 9.0}, {"p1": 9000, "p2": 5000}, None),
        ({"queued_tokens": 800}, {}, None),
        ({"queued_tokens": 10_000}, {}, (503, 4.6)),
        ({"queued_tokens": 10_000, "own_queued_tokens": 9_500}, {}, (429, 4.6)),
        ({"queued_tokens": 10_000, "own_queued_tokens": 500}, {}, (503, 4.6)),
        # cannot be split: only the slow decode worker counts
        ({"unsplittable": "n > 1"}, {}, (503, 8.5)),
        ({"unsplittable": "n > 1", "prompt_tokens": 100}, {}, None),
    ],
)
def test_refuses_what_no_choice_can_begin_in_time(profile, queued, expected):
    refused = refusal(replace(PROFILE, **profile), **queued)
    if expected is None:
        assert refused is None
        return
    assert (refused.status, pytest.approx(refused.retry_after_s)) == expected
    assert "allows" in refused.reason


def test_admits_while_nothing_is_known_or_nothing_was_asked_for():
    late = {"p1": 90_000, "p2": 90_000}
    assert refusal(predictor=Linear(known=False), **late) is None
    assert refusal(refuse_over=None, **late) is None
    assert SloAdmission().disagg_select_admission(PROFILE, FleetView((D1,), {})) is None


def test_the_first_choice_in_time_ends_the_search():
    predictor = Linear()
    fleet = (*(replace(P1, name=f"p{i}") for i in range(100)), D1)
    assert refusal(fleet=fleet, predictor=predictor) is None
    assert predictor.asked == 1


def test_a_fleet_without_workers_is_for_others_to_refuse():
    assert refusal(fleet=()) is None


def test_the_scheduler_refuses_by_what_it_learnt():
    worker = {"name": "d", "url": "http://127.0.0.1:1", "role": "both"}
    policy = Policy.model_validate(
        {
            "fleet": {"workers": [worker]},
            "scheduler": {"admission": {"refuse_over": 1.0}},
            "plugins": {"deadline_s": 9},
        }
    )
    fleet = FleetView((policy.fleet.workers[0].worker(),), {})
    with PluginHost.load((), entry_points=False) as host:
        scheduler = Scheduler(host, policy)
        assert scheduler.decide(PROFILE, fleet).route.decode.name == "d"
        for tokens in range(100, 4100, 100):
            scheduler.request_ended(
                {
                    "outcome": "ok",
                    "route": "local",
                    "decode": "d",
                    "stream": True,
                    "prompt_tokens": tokens,
                    "ttft_s": tokens / 100,
                }
            )
        with pytest.raises(NoCapacityError) as caught:
            scheduler.decide(PROFILE, fleet)
        assert caught.value.status == 503
        assert caught.value.retry_after_s == pytest.approx(9.0, rel=0.2)
        assert scheduler.decide(replace(PROFILE, prompt_tokens=50), fleet)
