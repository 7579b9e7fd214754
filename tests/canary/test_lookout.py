"""What people command: each command's reason is kept for those who read the log later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_plugins.canary.lookout import act
from disagg_plugins.canary.progress import Progress
from disagg_plugins.canary.rollout import Instant, Plan, Rollout

NOW = Instant(1_790_000_000.0, 0.0)
PLAN = Plan((50, 100), 60.0, fingerprint="plan")
RUNNING = Progress(
    rollout=1, phase="running", weight=50, plan="plan", seen_wall_s=NOW.wall_s, decisions=1
)
BEFORE = {
    "start": Progress(),
    "approve": replace(RUNNING, phase="awaiting"),
    "resume": replace(RUNNING, phase="held", why="lunch"),
    "hold": RUNNING,
    "rollback": RUNNING,
}


@pytest.mark.parametrize("do", BEFORE)
def test_the_reason_of_a_command_is_in_its_decision(do) -> None:
    _, decision = act(Rollout(PLAN, BEFORE[do]), do, NOW, "ann", "ticket 7")
    assert decision.by == "ann"
    assert decision.why[-1] == "ticket 7"


@pytest.mark.parametrize("do", BEFORE)
def test_a_command_without_a_reason_says_who_gave_it(do) -> None:
    _, decision = act(Rollout(PLAN, BEFORE[do]), do, NOW, "ann", "")
    assert len(decision.why) == 1
    assert "by ann" in decision.why[0]


def test_a_long_reason_is_cut_as_the_memory_cuts_it() -> None:
    _, decision = act(Rollout(PLAN, Progress()), "start", NOW, "ann", "x" * 5_000)
    assert len(decision.why[-1]) < 5_000
