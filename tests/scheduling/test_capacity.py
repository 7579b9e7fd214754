"""What a fleet takes and what it refuses."""

from __future__ import annotations

from disagg_plugins.scheduling.capacity import Capacity
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

PROFILE = RequestProfile("r", "/v1/completions", "m", 10)
D1, D2 = (Worker(name, "http://127.0.0.1:1", "vllm", Role.DECODE, 2) for name in ("d1", "d2"))
PREFILL = Worker("p", "http://127.0.0.1:2", "vllm", Role.PREFILL, 2)
FULL, SICK = WorkerLoad(requests=2), WorkerLoad(healthy=False)


def refusal(**loads):
    return Capacity().disagg_select_admission(PROFILE, FleetView((PREFILL, D1, D2), loads))


def test_admits_while_one_decode_worker_has_room():
    assert refusal() is None
    assert refusal(d1=FULL) is None
    assert refusal(d1=SICK, d2=WorkerLoad(requests=1), p=FULL) is None


def test_refuses_when_every_decode_worker_is_full_and_says_the_numbers():
    refused = refusal(d1=FULL, d2=FULL)
    assert refused.status == 429
    assert refused.retry_after_s > 0
    assert "4 requests in flight, 4 allowed" in refused.reason


def test_a_sick_worker_is_no_room():
    assert refusal(d1=FULL, d2=SICK).status == 429


def test_refuses_when_no_decode_worker_is_healthy():
    refused = refusal(d1=SICK, d2=SICK)
    assert refused.status == 503
    assert "no healthy decode worker" in refused.reason


def test_leaves_out_full_workers_only():
    fleet = FleetView((D1, D2), {"d1": FULL})
    assert Capacity().disagg_filter_workers((D1, D2), fleet) == [D2]
