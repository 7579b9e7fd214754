"""When a worker moves to the other role, and which."""

from __future__ import annotations

import pytest

from disagg_plugins.placement.types import RoleLoad
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.rebalance import Rebalance
from disagg_plugins.types import FleetView, Role, Worker, WorkerLoad


def worker(name: str, role: str, *, movable: bool = True) -> Worker:
    return Worker(name, f"http://h:{ord(name[0])}", "vllm", Role(role), movable=movable)


def judge(
    fleet: tuple[Worker, ...], prefill: float, decode: float, **requests: int
) -> tuple[str, str] | None:
    """Return worker and role of the change at these utilisations, high 0.8 and low 0.4."""
    rule = Rebalance()
    rule.disagg_on_start(
        Policy.model_validate(
            {"fleet": {"workers": [{"name": "x", "url": "http://h:1", "role": "both"}]}}
        )
    )
    view = FleetView(fleet, {name: WorkerLoad(count) for name, count in requests.items()})
    loads = {
        Role.PREFILL: RoleLoad(10.0, prefill, 0.0, 1.0, 1.0),
        Role.DECODE: RoleLoad(10.0, decode, 0.0, 1.0, 1.0),
    }
    change = rule.disagg_select_rebalance(view, loads)
    if change is None:
        return None
    assert f"{change.role} is used to" in change.reason
    return change.worker, str(change.role)


P, Q = worker("p", "prefill"), worker("q", "prefill")
D, E = worker("d", "decode"), worker("e", "decode")


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        (0.9, 0.1, ("d", "prefill")),
        (0.8, 0.4, ("d", "prefill")),
        (0.79, 0.4, None),
        (0.8, 0.41, None),
        (0.1, 0.9, ("p", "decode")),
        (0.9, 0.9, None),
        (0.1, 0.1, None),
        (0.5, 0.5, None),
    ],
)
def test_a_worker_moves_when_one_role_is_high_and_the_other_low(
    prefill: float, decode: float, expected: tuple[str, str] | None
) -> None:
    assert judge((P, Q, D, E), prefill, decode, d=1, e=2) == expected


def test_the_last_worker_of_a_role_stays() -> None:
    assert judge((P, Q, D), 0.9, 0.1) is None
    assert judge((P, D, E), 0.1, 0.9) is None


def test_workers_declared_for_one_role_stay() -> None:
    fixed = worker("d", "decode", movable=False)
    assert judge((P, fixed, E), 0.9, 0.1, e=50) == ("e", "prefill")
    assert judge((P, fixed, worker("e", "decode", movable=False)), 0.9, 0.1) is None


def test_a_worker_of_the_idle_role_alone_moves_before_one_that_serves_both() -> None:
    both = worker("b", "both")
    assert judge((P, both, D), 0.9, 0.1, d=5) == ("d", "prefill")
    assert judge((P, both, worker("d", "decode", movable=False)), 0.9, 0.1) == ("b", "prefill")


def test_nothing_moves_before_the_policy_is_told() -> None:
    loads = {role: RoleLoad(1.0, 0.5, 0.0, 1.0, 1.0) for role in (Role.PREFILL, Role.DECODE)}
    assert Rebalance().disagg_select_rebalance(FleetView((P, Q, D, E), {}), loads) is None
