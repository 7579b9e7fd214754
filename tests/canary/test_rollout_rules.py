"""The rules of a rollout, whatever evidence, people, clocks and restarts do, in any order."""

from __future__ import annotations

import json
from datetime import UTC

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugins.canary.freeze import WeeklyFreeze
from disagg_plugins.canary.guardrails import Judgement
from disagg_plugins.canary.progress import Decision, Progress
from disagg_plugins.canary.rollout import SKEW_S, Instant, Plan, Rollout
from disagg_plugins.errors import RolloutRefused

STEPS = (1, 5, 25, 100)
BAKE_S = 60.0
GAP_S = 100.0
NIGHT = WeeklyFreeze(range(7), 0, 5, UTC)  # the first minutes of each day
DAY_S = 86_400.0

ACTIONS = st.sampled_from([*["promote"] * 8, "wait", "rollback", None])
RARELY = st.sampled_from([*[False] * 7, True])


class Rules(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.plan = Plan(STEPS, BAKE_S, freezes=(NIGHT,), max_gap_s=GAP_S, fingerprint="a")
        self.rollout = Rollout(self.plan)
        self.wall_s = 20_000 * DAY_S - 400.0
        self.mono_s = 50.0
        self.log: list[Decision] = []
        # what the test itself keeps count of
        self.trusted_s = 0.0  # most that can have been watched at this step
        self.held = self.rolled_back = False
        self.approved = False
        self.plain = True  # the clocks were left alone since the last look

    def take(self, moved, decision):
        before = self.rollout.progress
        self.rollout = moved
        if decision is not None:
            assert decision.from_phase == before.phase
            self.log.append(decision)
        return before, moved.progress

    @rule(seconds=st.floats(0.0, 90.0))
    def time_passes(self, seconds):
        self.wall_s += seconds
        self.mono_s += seconds
        self.trusted_s += seconds

    @rule(
        jump_s=st.sampled_from([-DAY_S, -3_600.0, -SKEW_S - 1, SKEW_S + 1, 200.0, 3_600.0]),
        really=RARELY,
    )
    def the_wall_clock_jumps(self, jump_s, really):
        if not really:
            return
        self.wall_s += jump_s
        self.plain = False
        # across a restart nobody can tell it from time that passed
        self.trusted_s += min(max(0.0, jump_s), GAP_S)

    @rule(really=RARELY)
    def the_process_restarts(self, really):
        if not really:
            return
        stored = json.loads(json.dumps(self.rollout.progress.as_dict()))
        self.rollout = Rollout(self.plan, Progress.from_dict(stored))
        self.mono_s = 5.0

    @rule()
    def the_plan_asks_for_approval_or_not(self):
        self.plan = Plan(STEPS, BAKE_S, not self.plan.approval, (NIGHT,), GAP_S, "a")
        self.rollout = Rollout(self.plan, self.rollout.progress, self.rollout.last)

    @rule(seconds=st.sampled_from([55.0, 59.0, 60.0, 61.0]))
    def a_good_minute_passes(self, seconds):
        self.time_passes(seconds)
        self.somebody_looks("promote")

    @rule(seconds=st.sampled_from([30.0, 60.0, 95.0]))
    def another_good_minute_passes(self, seconds):
        self.a_good_minute_passes(seconds)

    @rule(action=ACTIONS)
    def somebody_looks(self, action):
        judgement = None if action is None else Judgement(action, (f"because {action}",), ())
        after_restart = self.rollout.last is None
        now = Instant(self.wall_s, self.mono_s)
        before, after = self.take(*self.rollout.tick(now, judgement))
        if before.active and action == "rollback":
            assert (after.phase, after.weight) == ("rolled_back", 0)
            self.rolled_back = True
        if after.weight > before.weight:
            assert action == "promote"
            assert not self.held
            assert not self.rolled_back
            assert self.plain or after_restart
            assert NIGHT.covers(self.wall_s) is False
            assert self.trusted_s >= BAKE_S - 1e-3  # wall clocks have seven digits of these
            assert self.approved or not self.plan.approval
            assert STEPS.index(after.weight) == STEPS.index(before.weight) + 1
            self.trusted_s = 0.0
            self.approved = False
        if after.phase == "held":
            self.held = True
        self.plain = True

    def command(self, name, *args):
        now = Instant(self.wall_s, self.mono_s)
        try:
            return self.take(*getattr(self.rollout, name)(now, *args))
        except RolloutRefused:
            return None

    @rule()
    def ann_starts(self):
        if self.command("start", "ann") is not None:
            assert NIGHT.covers(self.wall_s) is False
            self.held = self.rolled_back = self.approved = False
            self.trusted_s = 0.0
            self.plain = True

    @rule(really=RARELY)
    def ann_holds(self, really):
        if really and self.command("hold", "ann", "lunch") is not None:
            self.held, self.approved = True, False

    @rule()
    def ann_resumes(self):
        if self.command("resume", "ann") is not None:
            self.held, self.plain = False, True

    @rule()
    def ann_approves(self):
        if self.command("approve", "ann") is not None:
            self.approved = True

    @rule(really=RARELY)
    def ann_aborts(self, really):
        if really and self.command("abort", "ann", "enough") is not None:
            assert self.rollout.progress.weight == 0

    @invariant()
    def the_weight_is_a_step_or_nothing(self):
        assert self.rollout.progress.weight in (0, *STEPS)

    @invariant()
    def no_traffic_where_nothing_runs(self):
        progress = self.rollout.progress
        idle = progress.phase in ("pending", "rolled_back", "aborted")
        assert (progress.weight == 0) == idle

    @invariant()
    def the_log_tells_the_whole_story(self):
        assert [d.number for d in self.log] == list(range(1, len(self.log) + 1))
        phase, weight = "pending", 0
        for decision in self.log:
            assert (decision.from_phase, decision.from_weight) == (phase, weight)
            assert decision.why
            phase, weight = decision.to_phase, decision.to_weight
        progress = self.rollout.progress
        assert (phase, weight) == (progress.phase, progress.weight)
        assert progress.decisions == len(self.log)


TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
