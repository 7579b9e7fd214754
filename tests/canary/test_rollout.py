"""What moves the traffic, and what keeps it where it is."""

from __future__ import annotations

from datetime import UTC

import pytest

from disagg_plugins.canary.freeze import WeeklyFreeze
from disagg_plugins.canary.guardrails import Judgement
from disagg_plugins.canary.progress import Progress
from disagg_plugins.canary.rollout import Instant, Plan, Rollout, steps_problem
from disagg_plugins.errors import RolloutRefused

WALL = 1_790_000_000.0
PROMOTE = Judgement("promote", ("ttft p50 is within what is allowed: 0.9 s",), ())
ROLLBACK = Judgement("rollback", ("error_rate is worse than allowed: 0.2",), ())
WAIT = Judgement("wait", ("ttft p50 is not decided: 1 s",), ())
ALWAYS = WeeklyFreeze(range(7), 0, 24 * 60, UTC)
PLAN = Plan((1, 25, 100), bake_s=60.0)


def instant(after_s: float, jump_s: float = 0.0) -> Instant:
    return Instant(WALL + after_s + jump_s, 100.0 + after_s)


def started(plan: Plan = PLAN) -> Rollout:
    return Rollout(plan).start(instant(0.0), "ann")[0]


def looks(rollout, judgement, *times_s):
    """Look at each of the times; return the rollout and the kinds of the decisions."""
    kinds = []
    for time_s in times_s:
        rollout, decision = rollout.tick(instant(time_s), judgement)
        if decision is not None:
            kinds.append(decision.kind)
    return rollout, kinds


def at_the_last_step():
    rollout, kinds = looks(started(), PROMOTE, 60.0, 120.0)
    assert (kinds, rollout.progress.weight) == (["promote", "promote"], 100)
    return rollout


def test_before_it_is_started_nothing_goes_to_the_candidate():
    rollout, kinds = looks(Rollout(PLAN), PROMOTE, 0.0, 600.0)
    assert (rollout.progress.weight, kinds) == (0, [])


def test_start_gives_the_first_step():
    rollout, decision = Rollout(PLAN).start(instant(0.0), "ann")
    assert rollout.progress.weight == 1
    assert (decision.kind, decision.by) == ("start", "ann")
    assert (decision.from_weight, decision.to_weight) == (0, 1)


def test_a_good_candidate_takes_all_steps_and_completes():
    rollout, kinds = looks(started(), PROMOTE, *range(10, 200, 10))
    assert kinds == ["promote", "promote", "complete"]
    assert (rollout.progress.phase, rollout.progress.weight) == ("completed", 100)


def test_no_step_is_made_before_its_bake_time():
    rollout, kinds = looks(started(), PROMOTE, 30.0, 59.9)
    assert (kinds, rollout.progress.weight) == ([], 1)
    assert looks(rollout, PROMOTE, 60.0)[1] == ["promote"]


def test_the_bake_begins_anew_with_each_step():
    rollout, _ = looks(started(), PROMOTE, 200.0)
    assert rollout.progress.weight == 25
    assert looks(rollout, PROMOTE, 259.0)[1] == []


@pytest.mark.parametrize("judgement", [WAIT, None])
def test_no_step_is_made_without_evidence(judgement):
    rollout, kinds = looks(started(), judgement, 100.0, 200.0)
    assert (kinds, rollout.progress.weight) == ([], 1)


def test_a_promotion_tells_the_numbers_that_made_it():
    _, decision = started().tick(instant(60.0), PROMOTE)
    assert decision is not None
    assert (decision.from_weight, decision.to_weight, decision.by) == (1, 25, "evidence")
    assert decision.at_s == WALL + 60.0
    assert decision.why == ("60 s watched at 1 %", *PROMOTE.reasons)


def test_a_bad_candidate_is_rolled_back_at_the_first_look():
    rollout, decision = started().tick(instant(0.1), ROLLBACK)
    assert (rollout.progress.phase, rollout.progress.weight) == ("rolled_back", 0)
    assert decision is not None
    assert (decision.from_weight, decision.to_weight) == (1, 0)
    assert decision.why == ROLLBACK.reasons


def test_after_a_rollback_nothing_is_promoted_until_a_person_starts_anew():
    rollout, _ = looks(started(), ROLLBACK, 1.0)
    rollout, kinds = looks(rollout, PROMOTE, 100.0, 200.0)
    assert (kinds, rollout.progress.weight) == ([], 0)
    again, _ = rollout.start(instant(300.0), "ann")
    assert (again.progress.weight, again.progress.rollout) == (1, 2)


def test_evidence_of_another_step_or_rollout_has_another_epoch():
    first = started()
    second, _ = looks(first, PROMOTE, 60.0)
    anew, _ = looks(first, ROLLBACK, 1.0)[0].start(instant(2.0), "ann")
    assert len({first.progress.epoch, second.progress.epoch, anew.progress.epoch}) == 3


def test_hold_resume_and_approval_begin_no_new_evidence():
    rollout = started()
    held, _ = rollout.hold(instant(1.0), "ann", "lunch")
    resumed, _ = held.resume(instant(2.0), "ann")
    assert held.progress.epoch == resumed.progress.epoch == rollout.progress.epoch


def test_each_step_is_judged_at_its_share_of_the_level():
    assert PLAN.step_level(0.06) == pytest.approx(0.02)


# --- the last step ----------------------------------------------------------------------------


def test_the_last_step_completes_without_a_comparison_as_the_baseline_serves_nothing():
    rollout, kinds = looks(at_the_last_step(), WAIT, 179.0)
    assert kinds == []
    assert looks(rollout, WAIT, 180.0)[1] == ["complete"]


def test_the_last_step_does_not_complete_while_its_limits_cannot_be_judged():
    assert looks(at_the_last_step(), None, 180.0, 240.0)[1] == []


def test_a_limit_rolls_the_last_step_back():
    rollout, _ = looks(at_the_last_step(), ROLLBACK, 130.0)
    assert rollout.progress.weight == 0


# --- hold -------------------------------------------------------------------------------------


def test_a_hold_keeps_the_traffic_where_it_is():
    rollout, decision = started().hold(instant(1.0), "ann", "a release of something else")
    assert (decision.kind, decision.why) == ("hold", ("a release of something else",))
    rollout, kinds = looks(rollout, PROMOTE, 100.0, 200.0)
    assert (kinds, rollout.progress.weight) == ([], 1)
    assert rollout.lacks(instant(200.0), PROMOTE) == ("it is held: a release of something else",)


def test_a_held_rollout_is_rolled_back_all_the_same():
    rollout, _ = started().hold(instant(1.0), "ann", "lunch")
    assert looks(rollout, ROLLBACK, 2.0)[1] == ["rollback"]


def test_after_resume_the_next_look_promotes():
    rollout, _ = started().hold(instant(1.0), "ann", "lunch")
    rollout, _ = looks(rollout, PROMOTE, 100.0)
    rollout, decision = rollout.resume(instant(101.0), "bob")
    assert (decision.kind, decision.by, rollout.progress.why) == ("resume", "bob", "")
    assert looks(rollout, PROMOTE, 102.0)[1] == ["promote"]


# --- freeze -----------------------------------------------------------------------------------


def test_nothing_is_promoted_or_begun_in_a_freeze_and_rollback_still_works():
    frozen = Plan(PLAN.steps, PLAN.bake_s, freezes=(ALWAYS,))
    rollout = Rollout(frozen, started().progress)
    rollout, kinds = looks(rollout, PROMOTE, 60.0, 120.0)
    assert (kinds, rollout.progress.weight) == ([], 1)
    assert any("frozen: mon, tue" in text for text in rollout.lacks(instant(120.0), PROMOTE))
    assert looks(rollout, ROLLBACK, 130.0)[1] == ["rollback"]
    with pytest.raises(RolloutRefused, match="freeze"):
        Rollout(frozen).start(instant(0.0), "ann")


# --- approval ---------------------------------------------------------------------------------

MANUAL = Plan((1, 25, 100), bake_s=60.0, approval=True)


def test_where_a_person_approves_the_evidence_only_asks():
    rollout, kinds = looks(started(MANUAL), PROMOTE, 60.0, 120.0, 180.0)
    assert (kinds, rollout.progress.phase, rollout.progress.weight) == (["await"], "awaiting", 1)
    assert rollout.lacks(instant(180.0), PROMOTE) == ("a person must approve",)


def test_an_approval_is_for_one_step():
    rollout, _ = looks(started(MANUAL), PROMOTE, 60.0)
    rollout, decision = rollout.approve(instant(61.0), "ann")
    assert (decision.kind, decision.by) == ("approve", "ann")
    rollout, kinds = looks(rollout, PROMOTE, 62.0, 122.0, 130.0)
    assert (kinds, rollout.progress.weight) == (["promote", "await"], 25)


def test_an_approval_does_not_outweigh_the_evidence():
    rollout, _ = looks(started(MANUAL), PROMOTE, 60.0)
    rollout, _ = rollout.approve(instant(61.0), "ann")
    rollout, kinds = looks(rollout, WAIT, 62.0)
    assert kinds == []
    assert looks(rollout, PROMOTE, 63.0)[1] == ["promote"]


def test_a_hold_voids_an_approval():
    rollout, _ = looks(started(MANUAL), PROMOTE, 60.0)
    rollout, _ = rollout.approve(instant(61.0), "ann")
    rollout, _ = rollout.hold(instant(62.0), "ann", "wait")
    rollout, _ = rollout.resume(instant(63.0), "ann")
    assert looks(rollout, PROMOTE, 64.0)[1] == ["await"]


def test_while_a_person_is_waited_for_evidence_rolls_back():
    rollout, _ = looks(started(MANUAL), PROMOTE, 60.0)
    assert looks(rollout, ROLLBACK, 61.0)[1] == ["rollback"]


def test_completion_needs_no_approval_as_it_moves_no_traffic():
    rollout = started(MANUAL)
    for time_s in (60.0, 120.0):
        rollout, _ = looks(rollout, PROMOTE, time_s)
        rollout, _ = rollout.approve(instant(time_s), "ann")
        rollout, _ = looks(rollout, PROMOTE, time_s)
    assert looks(rollout, WAIT, 180.0)[1] == ["complete"]


# --- clocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [-3600.0, -6.0, 6.0, 3600.0])
def test_a_wall_clock_that_leaves_the_monotonic_one_holds(jump_s):
    rollout, _ = looks(started(), PROMOTE, 59.0)
    rollout, decision = rollout.tick(instant(61.0, jump_s), PROMOTE)
    assert (rollout.progress.phase, rollout.progress.weight) == ("held", 1)
    assert decision is not None
    assert (decision.kind, decision.by) == ("hold", "clock")


def test_a_clock_that_jumps_does_not_save_a_bad_candidate():
    rollout, decision = started().tick(instant(61.0, -3600.0), ROLLBACK)
    assert decision is not None
    assert (decision.kind, rollout.progress.weight) == ("rollback", 0)


def test_what_ntp_leaves_is_no_jump():
    rollout, _ = looks(started(), PROMOTE, 59.0)
    assert rollout.tick(instant(61.0, 0.5), PROMOTE)[0].progress.weight == 25


def test_a_monotonic_clock_that_goes_back_holds():
    rollout, _ = looks(started(), PROMOTE, 50.0)
    rollout, _ = rollout.tick(Instant(WALL + 50.0, 149.0), PROMOTE)
    assert rollout.progress.phase == "held"


def restarted(rollout: Rollout) -> Rollout:
    return Rollout(rollout.plan, rollout.progress)


def test_a_restart_goes_on_at_the_same_step_with_what_was_baked():
    rollout, _ = looks(started(), PROMOTE, 50.0)
    rollout, kinds = looks(restarted(rollout), PROMOTE, 55.0)
    assert (kinds, rollout.progress.baked_s) == ([], 55.0)
    assert looks(restarted(rollout), PROMOTE, 61.0)[1] == ["promote"]


@pytest.mark.parametrize(("after_s", "why"), [(-60.0, "behind the last look"), (400.0, "leapt")])
def test_a_restart_whose_wall_clock_went_back_or_leapt_holds(after_s, why):
    rollout, _ = looks(started(), PROMOTE, 59.0)
    rollout, kinds = looks(restarted(rollout), PROMOTE, 59.0 + after_s)
    assert (kinds, rollout.progress.baked_s) == (["hold"], 59.0)
    assert why in rollout.progress.why


def test_a_resume_after_a_jump_trusts_the_clock_again():
    rollout, _ = looks(restarted(started()), PROMOTE, 5_000.0)
    rollout, _ = rollout.resume(instant(5_001.0), "ann")
    assert looks(rollout, PROMOTE, 5_060.0)[1] == []
    assert looks(rollout, PROMOTE, 5_061.0)[1] == ["promote"]


def test_time_in_which_nobody_looked_counts_up_to_the_gap_only():
    plan = Plan((1, 100), bake_s=1_000.0, max_gap_s=300.0)
    rollout, _ = looks(started(plan), PROMOTE, 5_000.0)
    assert rollout.progress.baked_s == 300.0


@pytest.mark.parametrize("clock", [(-1.0, 0.0), (float("nan"), 0.0), (1e12, 0.0), (1.0, 1e999)])
def test_what_no_clock_shows_is_refused(clock):
    with pytest.raises(ValueError, match="no clock shows"):
        Instant(*clock)


# --- other plans, other commands --------------------------------------------------------------


def test_a_plan_that_changed_meanwhile_is_not_gone_on_with():
    other = Plan((10, 100), bake_s=0.0, fingerprint="other")
    rollout = Rollout(other, started().progress)
    rollout, kinds = looks(rollout, PROMOTE, 1.0, 2.0)
    assert (kinds, rollout.progress.weight) == (["hold"], 1)
    with pytest.raises(RolloutRefused, match="start anew"):
        rollout.resume(instant(3.0), "ann")
    rollout, _ = rollout.abort(instant(4.0), "ann", "a new plan")
    rollout, _ = rollout.start(instant(5.0), "ann")
    assert rollout.progress.weight == 10


@pytest.mark.parametrize("make", [started, at_the_last_step])
def test_abort_takes_all_traffic_back(make):
    rollout, decision = make().abort(instant(130.0), "ann", "looks odd")
    assert (rollout.progress.phase, rollout.progress.weight) == ("aborted", 0)
    assert decision.why == ("looks odd",)


def test_abort_works_after_completion_too():
    rollout, _ = looks(at_the_last_step(), WAIT, 180.0)
    assert rollout.abort(instant(9_000.0), "ann", "regret")[0].progress.weight == 0


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda: Rollout(PLAN), lambda r: r.hold(instant(1.0), "ann", "")),
        (lambda: Rollout(PLAN), lambda r: r.abort(instant(1.0), "ann", "")),
        (lambda: Rollout(PLAN), lambda r: r.resume(instant(1.0), "ann")),
        (started, lambda r: r.start(instant(1.0), "ann")),
        (started, lambda r: r.approve(instant(1.0), "ann")),
        (started, lambda r: r.resume(instant(1.0), "ann")),
    ],
)
def test_what_a_state_does_not_allow_is_refused_with_the_state(make, command):
    with pytest.raises(RolloutRefused, match="the rollout is"):
        command(make())


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ((), "between"),
        ((0, 100), "grow"),
        ((5, 5, 100), "grow"),
        ((50, 5, 100), "grow"),
        ((1, 50), "must be 100"),
    ],
)
def test_steps_grow_and_end_at_100(steps, problem):
    assert problem in (steps_problem(steps) or "")
    with pytest.raises(ValueError, match=problem):
        Plan(steps, 1.0)


def test_a_progress_with_no_look_is_pending():
    assert Rollout(PLAN).lacks(instant(0.0), None) == ("the rollout is pending",)
    assert Progress().epoch.rollout == 0
