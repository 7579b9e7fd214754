"""What plugins may answer when they are asked for a change of roles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.placement.types import RoleChange
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import PluginPolicy
from disagg_plugins.types import FleetView, Role, Worker

FLEET = FleetView((Worker("a", "http://h:1", "vllm", Role.DECODE),), {})


@pytest.mark.parametrize(
    ("answer", "failures"),
    [
        (None, 0),
        (RoleChange("a", Role.PREFILL, "why"), 0),
        (RoleChange("b", Role.PREFILL, "why"), 1),
        (RoleChange("a", "prefill", "why"), 1),  # type: ignore[arg-type]
        ("a", 1),
    ],
)
def test_only_a_change_of_a_worker_that_is_there_counts(answer: object, failures: int) -> None:
    plugin = SimpleNamespace(disagg_select_rebalance=hookimpl(lambda: answer))
    policy = PluginPolicy(deadline_s=10)
    with PluginHost.load(policy, builtins=False, entry_points=False, extra=[("x", plugin)]) as host:
        found = host.placement.select_rebalance(FLEET, {})
        assert found == (None if failures else answer)
        assert sum(host.counts.values()) == failures
