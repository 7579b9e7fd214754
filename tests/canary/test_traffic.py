"""Which requests are counted, for which arm, and how they ended."""

from __future__ import annotations

import pytest

from disagg_plugins.canary.efficiency import Scale
from disagg_plugins.canary.progress import Epoch
from disagg_plugins.canary.traffic import Arrived, Traffic
from disagg_plugins.telemetry.records import RequestRecord

HORIZON_S = 10.0


@pytest.fixture
def traffic() -> Traffic:
    return Traffic(HORIZON_S, 1.0)


def record(name: str, outcome: str = "ok", **more: object) -> RequestRecord:
    return RequestRecord(
        name, 0.0, "/v1/completions", None, "local", "", None, "d0", True, 10,
        outcome=outcome, status=200, e2e_s=1.0, ttft_s=0.1, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def arrive(traffic: Traffic, name: str, at_s: float, arm: str = "candidate", **more: float) -> None:
    traffic.enter(name, Arrived(arm, at_s, True, **more))  # type: ignore[arg-type]


def test_outcomes_come_in_the_order_of_arrival(traffic: Traffic) -> None:
    arrive(traffic, "slow", 0.0)
    arrive(traffic, "fast", 1.0, arm="baseline")
    traffic.settled(record("fast"), "baseline")
    assert traffic.due(2.0) == []
    traffic.settled(record("slow"), "candidate")
    assert [(o.arm, o.arrival_s) for o in traffic.due(2.0)] == [
        ("candidate", 0.0),
        ("baseline", 1.0),
    ]
    assert traffic.counted == {"baseline": 1, "candidate": 1}


def test_one_that_never_ends_counts_as_overdue(traffic: Traffic) -> None:
    arrive(traffic, "hangs", 0.0)
    assert traffic.due(10.9) == []
    assert [o.ended for o in traffic.due(11.1)] == ["overdue"]


def test_the_other_arm_that_answered_instead_is_not_counted(traffic: Traffic) -> None:
    arrive(traffic, "a", 0.0)
    traffic.refused("a", "candidate", 503, 0.5)
    traffic.settled(record("a"), "baseline")
    assert [(o.arm, o.ended, o.e2e_s) for o in traffic.due(1.0)] == [("candidate", "error", 0.5)]


@pytest.mark.parametrize(
    ("status", "ended"), [(400, "rejected"), (429, "rejected"), (404, "error"), (503, "error")]
)
def test_a_refusal_is_the_clients_fault_or_the_arms(traffic, status, ended) -> None:
    arrive(traffic, "a", 0.0)
    traffic.refused("a", "candidate", status, 0.5)
    assert [o.ended for o in traffic.due(1.0)] == [ended]


def test_a_client_that_left_before_its_request_began_is_censored(traffic: Traffic) -> None:
    arrive(traffic, "a", 0.0)
    traffic.left("a", 3.0)
    assert [(o.ended, o.e2e_s) for o in traffic.due(4.0)] == [("client_gone", 3.0)]


def test_a_new_step_forgets_what_arrived_before(traffic: Traffic) -> None:
    arrive(traffic, "a", 0.0)
    traffic.begin(Epoch(1, 1))
    traffic.settled(record("a"), "candidate")
    assert traffic.due(100.0) == []
    assert len(traffic) == 0


def test_the_bounds_of_its_slo_class_decide_on_goodput(traffic: Traffic) -> None:
    arrive(traffic, "kept", 0.0, ttft_slo_s=0.2)
    arrive(traffic, "missed", 0.0, ttft_slo_s=0.05)
    for name in ("kept", "missed"):
        traffic.settled(record(name), "candidate")
    assert [o.within_slo for o in traffic.due(1.0)] == [True, False]


@pytest.mark.parametrize("end", ["settled", "refused", "overdue"])
def test_every_outcome_that_is_known_carries_the_scale_of_its_fleet(
    traffic: Traffic, end: str
) -> None:
    scale = Scale(0.5, 0.25)
    traffic.enter("a", Arrived("candidate", 0.0, True, 1.0, None, scale))
    if end == "settled":
        traffic.settled(record("a"), "candidate")
    elif end == "refused":
        traffic.refused("a", "candidate", 503, 0.1)
    (outcome,) = traffic.due(1_000_000.0)
    assert (outcome.per_worker, outcome.per_cost) == scale
