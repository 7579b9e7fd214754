"""Several gateways, one rollout: who counts, who decides, and what happens without a memory."""

from __future__ import annotations

import pytest

from disagg_plugins.canary.case import Terms
from disagg_plugins.canary.guardrail import Guardrail
from disagg_plugins.canary.keeper import Keeper, command
from disagg_plugins.canary.metrics import Outcome
from disagg_plugins.canary.rollout import Instant, Plan
from disagg_plugins.canary.sqlite_store import SqliteStore
from disagg_plugins.errors import RolloutRefused, StoreConflict, StoreUnavailable

WALL = 1_790_000_000.0
GUARDRAILS = [Guardrail(metric="error_rate", slack=0.2)]
LEVEL = 0.05
PLAN = Plan((10, 50, 100), bake_s=10.0, fingerprint="p")
TERMS = Terms(tuple(GUARDRAILS), PLAN.step_level(LEVEL))
LEASE_S = 15.0


class Flaky:
    """A store that can be taken away."""

    def __init__(self, store):
        self.store = store
        self.away = False

    def __getattr__(self, name):
        if self.away:
            raise StoreUnavailable("it", "away")
        return getattr(self.store, name)


@pytest.fixture
def store(tmp_path, clock):
    store = SqliteStore(tmp_path / "canary.sqlite", clock=clock)
    yield store
    store.close()


class Site:
    """Gateways on one store; time passes only when told."""

    def __init__(self, store, clock):
        self.store, self.clock = store, clock
        self.after_s = 0.0
        self.views = {}

    def keeper(self, gateway, writer="1", plan=PLAN, store=None):
        return Keeper(
            store or self.store,
            plan,
            TERMS,
            gateway=gateway,
            writer=writer,
            lease_s=LEASE_S,
        )

    @property
    def now(self):
        return Instant(WALL + self.after_s, self.after_s)

    def pass_s(self, seconds):
        self.after_s += seconds
        self.clock.now_s += seconds

    def start(self, plan=PLAN):
        return command(self.store, plan, lambda rollout: rollout.start(self.now, "ann"))

    def look(self, keeper, requests=0, failed=0):
        """Let requests of both arms end at a gateway, some of the candidate's badly; then look."""
        view = self.views.get(keeper)
        ends = ["error"] * failed + ["ok"] * (requests - failed)
        outcomes = [
            (view.epoch, Outcome(arm, self.after_s, ended))
            for good in ends
            for arm, ended in (("baseline", "ok"), ("candidate", good))
            if view is not None
        ]
        self.views[keeper] = keeper.look(self.now, outcomes)
        return self.views[keeper]


@pytest.fixture
def site(store, clock):
    return Site(store, clock)


def test_a_good_candidate_goes_all_the_way(site):
    site.start()
    keeper = site.keeper("a")
    weights = [site.look(keeper).weight]
    for _ in range(8):
        site.pass_s(5.0)
        weights.append(site.look(keeper, 200).weight)
    assert weights == [10, 10, 50, 50, 100, 100, 100, 100, 100]
    kinds = [decision.kind for decision in site.store.decisions()]
    assert kinds == ["complete", "promote", "promote", "start"]


def test_the_log_has_the_numbers_that_decided(site):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    site.look(keeper, 100, failed=80)
    newest = site.store.decisions()[0]
    assert newest.kind == "rollback"
    assert "error_rate is worse than allowed: 0.8" in newest.why[0]
    assert "100 requests" in newest.why[0]


def test_one_decides_and_the_others_follow(site):
    site.start()
    first, second = site.keeper("a"), site.keeper("b")
    assert site.look(first).leads
    assert not site.look(second).leads
    site.pass_s(10.0)
    site.look(first, 200)
    assert site.look(second).weight == 50


def test_evidence_of_all_gateways_counts(site):
    site.start()
    leader, other = site.keeper("a"), site.keeper("b")
    site.look(leader)
    site.look(other)
    site.look(other, 100, failed=80)
    assert site.look(leader).weight == 0
    assert site.look(other).weight == 0


def test_when_the_leader_dies_another_takes_over_with_all_that_was_counted(site):
    site.start()
    leader, other = site.keeper("a"), site.keeper("b")
    site.look(leader)
    site.look(other)
    site.look(leader, 200)
    site.pass_s(LEASE_S)
    view = site.look(other)
    assert (view.leads, view.weight) == (True, 50)


def test_who_closes_lets_another_lead_at_once(site):
    site.start()
    leader, other = site.keeper("a"), site.keeper("b")
    site.look(leader)
    leader.close()
    leader.close()
    assert site.look(other).leads


def test_a_restart_goes_on_with_what_was_counted_and_baked(site):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    site.pass_s(6.0)
    site.look(keeper, 200)
    again = site.keeper("a", writer="2")
    assert site.look(again).weight == 10
    site.pass_s(4.0)
    assert site.look(again).weight == 50


def test_requests_of_another_step_do_not_count(site):
    site.start()
    keeper = site.keeper("a")
    early = site.look(keeper)
    site.pass_s(10.0)
    assert site.look(keeper, 200).weight == 50
    # they arrived at 10 % and ended late
    late = [(early.epoch, Outcome("candidate", 0.0, "error")) for _ in range(100)]
    assert keeper.look(site.now, late).weight == 50
    assert keeper.report()[1].verdicts[0].candidate.count == 0


def test_bake_time_is_counted_once_when_the_lead_goes_back_and_forth(site):
    plan = Plan((10, 100), bake_s=1_000.0, fingerprint="p")
    site.start(plan)
    first, second = site.keeper("a", plan=plan), site.keeper("b", plan=plan)
    site.look(first)
    for keeper in (second, first, second, first):
        (first if keeper is second else second).close()
        site.pass_s(20.0)
        site.look(keeper)
    assert site.store.load().progress.baked_s == 80.0


def test_a_second_process_of_the_same_name_is_told_and_decides_nothing(site):
    site.start()
    first, twin = site.keeper("a"), site.keeper("a", writer="twin")
    site.look(first)
    assert site.look(twin).trouble is None  # as after a restart
    view = site.look(first)
    assert "names must be unique" in view.trouble
    assert not view.leads


def test_what_keeps_the_next_step_away_is_told(site):
    site.start()
    view = site.look(site.keeper("a"))
    assert "10 s of 10 s of bake time are left" in view.lacks
    assert any("decides nothing" in text for text in view.lacks)


# --- without a memory -------------------------------------------------------------------------


def test_a_store_that_is_away_holds_the_traffic_where_it_is(site):
    flaky = Flaky(site.store)
    keeper = site.keeper("a", store=flaky)
    site.start()
    site.look(keeper)
    flaky.away = True
    site.pass_s(20.0)
    view = site.look(keeper, 200)
    assert (view.weight, view.leads) == (10, False)
    assert "away" in view.trouble
    flaky.away = False
    assert site.look(keeper).weight == 50


def test_a_gateway_whose_own_requests_fail_takes_its_traffic_back_without_the_store(site):
    flaky = Flaky(site.store)
    keeper, leader = site.keeper("a", store=flaky), site.keeper("leader")
    site.start()
    site.look(leader)
    site.look(keeper)
    flaky.away = True
    assert site.look(keeper, 100, failed=80).weight == 0
    assert site.look(keeper).weight == 0
    flaky.away = False
    assert site.look(keeper).weight == 0
    assert site.store.decisions()[0].kind == "rollback"
    assert site.look(leader).weight == 0


def test_before_the_memory_was_ever_read_the_baseline_serves_all(site):
    flaky = Flaky(site.store)
    flaky.away = True
    site.start()
    view = site.look(site.keeper("a", store=flaky))
    assert view.weight == 0
    assert view.trouble is not None


def test_a_file_that_others_may_read_now_is_trouble_and_no_crash(site, tmp_path):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    site.store.close()
    (tmp_path / "canary.sqlite").chmod(0o644)
    site.pass_s(10.0)
    view = site.look(keeper, 200)
    assert view.weight == 10
    assert "chmod 600" in view.trouble


def damage_evidence(site, gateway):
    with site.store.transaction() as execute:
        execute(
            "UPDATE disagg_canary_evidence SET evidence = '{\"version\": 9}' WHERE gateway = ?",
            (gateway,),
        )


def test_damaged_evidence_of_a_gateway_holds_and_names_it(site):
    site.start()
    leader, other = site.keeper("a"), site.keeper("b")
    site.look(leader)
    site.look(other)
    damage_evidence(site, "b")
    site.pass_s(10.0)
    view = site.look(leader, 200)
    assert (view.progress.phase, view.weight) == ("held", 10)
    assert "gateway b" in view.progress.why


def test_damaged_evidence_does_not_save_a_bad_candidate(site):
    site.start()
    leader, other = site.keeper("a"), site.keeper("b")
    site.look(leader)
    site.look(other)
    damage_evidence(site, "b")
    assert site.look(leader, 100, failed=80).weight == 0


def test_ones_own_damaged_evidence_decides_nothing_until_a_person_starts_anew(site):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    damage_evidence(site, "a")
    again = site.keeper("a", writer="2")
    for _ in range(3):
        site.pass_s(10.0)
        view = site.look(again, 200)
        assert "begin the canary anew" in view.trouble
        assert view.weight == 10
    command(site.store, PLAN, lambda rollout: rollout.abort(site.now, "ann", "damaged"))
    site.start()
    assert site.look(again).trouble is None


def rewind(site, revision):
    with site.store.transaction() as execute:
        execute("UPDATE disagg_canary_progress SET revision = ?", (revision,))


def test_a_memory_that_went_back_is_held(site):
    site.start()
    keeper = site.keeper("a")
    for _ in range(3):
        site.look(keeper)
    rewind(site, 1)
    view = site.look(keeper)
    assert view.progress.phase == "held"
    assert "went back" in view.progress.why


def test_a_memory_that_went_back_behind_a_rollback_moves_no_traffic(site, tmp_path):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    before = site.store.load()
    site.look(keeper, 100, failed=80)
    with site.store.transaction() as execute:
        import json

        text = json.dumps({**before.progress.as_dict(), "decisions": 2})
        execute("UPDATE disagg_canary_progress SET revision = 1, progress = ?", (text,))
    assert site.look(keeper).weight == 0
    assert site.store.load().progress.phase == "aborted"


def test_a_memory_that_is_gone_gives_all_traffic_to_the_baseline(site):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    with site.store.transaction() as execute:
        execute("DELETE FROM disagg_canary_progress", ())
    view = site.look(keeper)
    assert (view.weight, view.progress.phase) == (0, "pending")


# --- people -----------------------------------------------------------------------------------


def test_a_persons_command_reaches_all_gateways(site):
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    command(site.store, PLAN, lambda rollout: rollout.hold(site.now, "ann", "lunch"))
    site.pass_s(10.0)
    assert site.look(keeper, 200).progress.phase == "held"
    command(site.store, PLAN, lambda rollout: rollout.resume(site.now, "ann"))
    assert site.look(keeper).weight == 50


def test_a_command_that_others_wrote_before_is_made_again(site):
    site.start()
    keeper = site.keeper("a")
    calls = []

    def hold(rollout):
        if not calls:
            site.look(keeper)  # in between
        calls.append(rollout.progress)
        return rollout.hold(site.now, "ann", "lunch")

    assert command(site.store, PLAN, hold).kind == "hold"
    assert len(calls) == 2


def test_a_command_gives_up_where_others_always_come_before(site):
    site.start()
    keeper = site.keeper("a")

    def hold(rollout):
        site.look(keeper)
        return rollout.hold(site.now, "ann", "lunch")

    with pytest.raises(StoreConflict):
        command(site.store, PLAN, hold)


def test_a_command_that_is_not_allowed_writes_nothing(site):
    with pytest.raises(RolloutRefused):
        command(site.store, PLAN, lambda rollout: rollout.approve(site.now, "ann"))
    assert site.store.load().revision == 0


def test_gateways_with_another_plan_hold(site):
    site.start()
    other = Plan((10, 50, 100), bake_s=10.0, fingerprint="another candidate")
    keeper = site.keeper("a", plan=other)
    view = site.look(keeper)
    assert view.progress.phase == "held"
    assert "other ones" in view.progress.why


def test_after_a_promotion_the_next_step_waits_for_evidence_not_for_a_judge(site) -> None:
    site.start()
    keeper = site.keeper("a")
    site.look(keeper)
    site.pass_s(10.0)
    view = site.look(keeper, 200)
    assert view.weight == 50
    assert not [lack for lack in view.lacks if "cannot be judged" in lack]
