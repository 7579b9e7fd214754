"""What is stored of a rollout: plain values, and nothing else is taken for them."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.canary.progress import Decision, Epoch, Progress
from disagg_plugins.errors import DamagedState

PROGRESS = Progress("running", 2, 1, 5, 12.5, 1e9, True, 7, "abc", "")
DECISION = Decision(
    7, 2, 1e9, "promote", "evidence", "running", "running", 1, 5, 0, 600.0, ("ttft p50 is ok",)
)


def test_both_survive_json():
    assert Progress.from_dict(json.loads(json.dumps(PROGRESS.as_dict()))) == PROGRESS
    assert Decision.from_dict(json.loads(json.dumps(DECISION.as_dict()))) == DECISION


def test_evidence_belongs_to_a_step_of_a_rollout():
    assert PROGRESS.epoch == Epoch(rollout=2, step=1)


@pytest.mark.parametrize(
    "damage",
    [
        {"phase": "runing"},
        {"phase": ["running"]},
        {"weight": 101},
        {"weight": 0},
        {"phase": "rolled_back"},
        {"step": -1},
        {"step": True},
        {"baked_s": float("nan")},
        {"baked_s": -1.0},
        {"seen_wall_s": float("inf")},
        {"approved": 1},
        {"plan": None},
        {"why": "x" * 3_000},
        {"more": 1},
    ],
)
def test_a_damaged_progress_is_an_error(damage):
    with pytest.raises(DamagedState):
        Progress.from_dict({**PROGRESS.as_dict(), **damage})


@pytest.mark.parametrize(
    "damage",
    [{"number": 0}, {"kind": "demote"}, {"why": "text"}, {"why": [1]}, {"to_phase": None}],
)
def test_a_damaged_decision_is_an_error(damage):
    with pytest.raises(DamagedState):
        Decision.from_dict({**DECISION.as_dict(), **damage})


@pytest.mark.parametrize("state", [None, [], "running", {}, 3])
def test_anything_else_is_an_error(state):
    with pytest.raises(DamagedState):
        Progress.from_dict(state)
