"""How many prompts a prefill worker is given at once."""

from __future__ import annotations

import pytest

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.scheduling.prediction import queue_share
from disagg_plugins.scheduling.prefill_slots import PrefillSlots, has_slot
from disagg_plugins.types import (
    Disaggregated,
    FleetView,
    Local,
    RequestProfile,
    Role,
    Worker,
    WorkerLoad,
)

P1, P2 = (Worker(n, "http://127.0.0.1:1", "vllm", Role.PREFILL, 4) for n in ("p1", "p2"))
D = Worker("d", "http://127.0.0.1:2", "vllm", Role.DECODE, 4)
HANDED_ONLY = Worker("d", "http://127.0.0.1:2", "vllm", Role.DECODE, 4, whole=False)
LONG = RequestProfile("r", "/v1/completions", "m", 900)
READING = WorkerLoad(requests=1, prefills=1)


def policy(most):
    workers = [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]
    queue = {"prefills_per_worker": most}
    return Policy.model_validate(
        {"fleet": {"workers": workers}, "scheduler": {"queue": queue}, "plugins": {"deadline_s": 9}}
    )


def plugin(most):
    slots = PrefillSlots()
    slots.disagg_on_start(policy(most))
    return slots


def decide(fleet, profile=LONG, most=1):
    with PluginHost.load((), entry_points=False) as host:
        return Scheduler(host, policy(most)).decide(profile, fleet)


def test_leaves_out_prefill_workers_without_a_slot():
    fleet = FleetView((P1, P2, D), {"p1": READING})
    assert plugin(1).disagg_filter_workers(Role.PREFILL, (P1, P2), fleet) == [P2]
    assert plugin(2).disagg_filter_workers(Role.PREFILL, (P1, P2), fleet) == [P1, P2]


def test_has_no_opinion_on_decode_workers_or_without_a_bound():
    fleet = FleetView((P1, P2, D), {"p1": READING})
    assert plugin(1).disagg_filter_workers(Role.DECODE, (P1,), fleet) is None
    assert plugin(None).disagg_filter_workers(Role.PREFILL, (P1,), fleet) is None


@pytest.mark.parametrize(
    ("load", "most", "free"),
    [
        (WorkerLoad(), None, True),
        (WorkerLoad(requests=3, prefills=3), None, True),
        (WorkerLoad(requests=4, prefills=3), None, False),
        (WorkerLoad(requests=3, prefills=3), 3, False),
        (WorkerLoad(requests=3, prefills=2), 3, True),
        (WorkerLoad(trial=True), 3, True),
        (WorkerLoad(requests=1, trial=True), 3, False),
    ],
)
def test_a_slot_is_room_for_one_more_prompt(load, most, free):
    assert has_slot(P1, FleetView((P1,), {"p1": load}), most) is free


@pytest.mark.parametrize(("queued", "tokens"), [(0, 0), (1, 1), (100, 50), (101, 51)])
def test_what_waits_at_the_gateway_is_spread_over_the_prefill_workers(queued, tokens):
    fleet = FleetView((P1, P2, D), {})
    assert queue_share(queued, fleet) == tokens


def test_a_decision_says_when_waiting_would_help():
    both = {"p1": READING, "p2": READING}
    taken = decide(FleetView((P1, P2, D), both))
    assert taken.route == Local(D)
    assert taken.taken
    assert "prefill-slots" in taken.reason
    one = decide(FleetView((P1, P2, D), {"p1": READING}))
    assert one.route == Disaggregated(P2, D)
    assert not one.taken
    assert not decide(FleetView((D,), {})).taken
    sick = {"p1": WorkerLoad(healthy=False), "p2": WorkerLoad(healthy=False)}
    assert not decide(FleetView((P1, P2, D), sick)).taken


def test_waiting_for_a_worker_that_does_not_fit_does_not_help():
    fleet = FleetView((P1, P2, D), {"p1": READING}, {("p1", "d"): "x", ("p2", "d"): "x"})
    assert not decide(fleet).taken


def test_a_refusal_says_when_waiting_would_help():
    with pytest.raises(NoCapacityError) as caught:
        decide(FleetView((P1, HANDED_ONLY), {"p1": READING}))
    assert caught.value.taken
    full = {"p1": READING, "d": WorkerLoad(requests=4)}
    with pytest.raises(NoCapacityError) as caught:
        decide(FleetView((P1, HANDED_ONLY), full))
    assert not caught.value.taken
