"""What every memory of a rollout must keep to: the same for SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from disagg_plugins.canary.progress import Epoch, Progress
from disagg_plugins.canary.rollout import Instant, Plan, Rollout
from disagg_plugins.canary.store import MOST_GATEWAYS, Stored
from disagg_plugins.errors import StoreConflict

PLAN = Plan((1, 25, 100), bake_s=0.0)
NOW = Instant(1_790_000_000.0, 0.0)
BEGUN, START = Rollout(PLAN).start(NOW, "ann")
HELD, HOLD = BEGUN.hold(NOW, "ann", "lunch")
FIRST = Epoch(1, 0)


@pytest.fixture
def store(open_store):
    return open_store()


@pytest.fixture
def begun(store):
    """A store in which a rollout was begun: revision 1."""
    store.commit(BEGUN.progress, [START], revision=0, lease=None)
    return store


def test_an_empty_one_tells_of_a_pending_rollout(store):
    assert store.load() == Stored(Progress(), 0)
    assert store.decisions() == []


def test_what_is_committed_is_there_for_others(begun, open_store):
    other = open_store()
    assert other.load() == Stored(BEGUN.progress, 1)
    assert other.decisions() == [START]


def test_canaries_of_other_names_are_apart(begun, open_store):
    other = open_store("another")
    assert other.load().revision == 0
    assert other.lead("a", 10.0) is not None
    assert begun.lead("b", 10.0) is not None


def test_a_look_without_a_decision_is_written_too(begun):
    seen = replace(BEGUN.progress, baked_s=5.0)
    assert begun.commit(seen, [], revision=1, lease=None) == 2
    assert begun.load() == Stored(seen, 2)
    assert begun.decisions() == [START]


def test_who_has_not_seen_the_last_write_writes_nothing(begun, open_store):
    other = open_store()
    with pytest.raises(StoreConflict, match="revision 1, not 0"):
        other.commit(BEGUN.progress, [START], revision=0, lease=None)
    assert other.load().revision == 1


@pytest.mark.parametrize(
    ("progress", "decisions"),
    [
        (HELD.progress, []),  # the decision that led there is missing
        (BEGUN.progress, [HOLD]),  # the progress is the old one
        (HELD.progress, [START, HOLD]),  # the first is known already
    ],
)
def test_the_log_has_no_gap_and_nothing_twice(begun, progress, decisions):
    with pytest.raises(StoreConflict, match="do not follow"):
        begun.commit(progress, decisions, revision=1, lease=None)
    assert begun.load().progress == BEGUN.progress
    assert begun.decisions() == [START]


def test_progress_and_log_are_written_together_or_not_at_all(begun, monkeypatch):
    class Broken(type(HOLD)):
        def as_dict(self):
            raise RuntimeError("in the middle")

    broken = Broken(**{name: getattr(HOLD, name) for name in HOLD.__slots__})
    with pytest.raises(RuntimeError, match="in the middle"):
        begun.commit(HELD.progress, [broken], revision=1, lease=None)
    assert begun.load() == Stored(BEGUN.progress, 1)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM disagg_canary_log WHERE canary = ?",
        "UPDATE disagg_canary_log SET decision = '{}' WHERE canary = ?",
    ],
)
def test_the_log_only_grows(begun, statement):
    with pytest.raises(Exception, match="the log only grows"), begun.transaction() as execute:
        execute(statement, (begun._canary,))
    assert begun.decisions() == [START]


def test_the_log_is_read_newest_first_and_in_pieces(begun):
    begun.commit(HELD.progress, [HOLD], revision=1, lease=None)
    assert [d.number for d in begun.decisions()] == [2, 1]
    assert [d.number for d in begun.decisions(most=1)] == [2]
    assert [d.number for d in begun.decisions(before=2)] == [1]
    assert begun.decisions(most=0) == []


# --- lease ------------------------------------------------------------------------------------


def test_one_gateway_leads_at_a_time(store, open_store):
    lease = store.lead("a", 10.0)
    assert lease is not None
    assert open_store().lead("b", 10.0) is None


def test_a_leader_keeps_its_fence_while_it_renews(store, clock):
    first = store.lead("a", 10.0)
    clock.now_s += 9.0
    again = store.lead("a", 10.0)
    assert first is not None
    assert again is not None
    assert first.fence == again.fence
    clock.now_s += 9.0
    assert store.lead("b", 10.0) is None


def test_a_lease_ends_by_itself_and_the_next_has_a_higher_fence(store, clock):
    first = store.lead("a", 10.0)
    clock.now_s += 10.0
    second = store.lead("b", 10.0)
    assert first is not None
    assert second is not None
    assert second.fence > first.fence
    assert store.lead("a", 10.0) is None


def test_a_leader_that_slept_is_fenced_off(begun, open_store, clock):
    slept = begun.lead("a", 10.0)
    clock.now_s += 11.0
    other = open_store()
    lease = other.lead("b", 10.0)
    with pytest.raises(StoreConflict, match="of a is over"):
        begun.commit(HELD.progress, [HOLD], revision=1, lease=slept)
    assert other.commit(HELD.progress, [HOLD], revision=1, lease=lease) == 2


def test_a_lease_that_ended_is_worth_nothing_even_if_nobody_took_it(begun, clock):
    lease = begun.lead("a", 10.0)
    clock.now_s += 10.5
    with pytest.raises(StoreConflict, match="ended 0.5 s ago"):
        begun.commit(HELD.progress, [HOLD], revision=1, lease=lease)


def test_a_person_needs_no_lease_and_the_leader_notices(begun, open_store):
    lease = begun.lead("a", 10.0)
    open_store().commit(HELD.progress, [HOLD], revision=1, lease=None)
    with pytest.raises(StoreConflict, match="revision 2"):
        begun.commit(BEGUN.progress, [], revision=1, lease=lease)


def test_who_resigns_makes_room_at_once_and_is_fenced_off(store, open_store):
    lease = store.lead("a", 10.0)
    assert lease is not None
    store.resign(lease)
    following = open_store().lead("b", 10.0)
    assert following is not None
    assert following.fence > lease.fence
    store.resign(lease)  # takes nothing from the other
    assert store.lead("c", 10.0) is None


def test_a_clock_that_went_back_does_not_prolong_a_lease(store, clock):
    store.lead("a", 10.0)
    clock.now_s -= 3_600.0
    assert store.lead("b", 10.0) is not None


def test_of_many_that_want_it_at_once_one_gets_it(open_store):
    stores = {name: open_store() for name in "abcdef"}
    found = []
    barrier = threading.Barrier(len(stores))

    def want(name):
        barrier.wait(10)
        if stores[name].lead(name, 10.0) is not None:
            found.append(name)

    threads = [threading.Thread(target=want, args=(name,)) for name in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 1


def test_of_many_that_write_at_once_each_revision_is_one_ones(begun, open_store):
    stores = [open_store() for _ in range(4)]
    won = []
    barrier = threading.Barrier(len(stores))

    def write(store):
        barrier.wait(10)
        try:
            won.append(store.commit(HELD.progress, [HOLD], revision=1, lease=None))
        except StoreConflict:
            pass

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert won == [2]
    assert [d.kind for d in begun.decisions()] == ["hold", "start"]


# --- evidence ---------------------------------------------------------------------------------


def test_each_gateway_has_its_own_evidence_and_writing_twice_counts_once(begun, open_store):
    begun.contribute(FIRST, "a", "a1", {"n": 1})
    begun.contribute(FIRST, "a", "a1", {"n": 2})
    open_store().contribute(FIRST, "b", "b1", {"n": 7})
    assert begun.evidence(FIRST) == {"a": {"n": 2}, "b": {"n": 7}}


def test_a_gateway_that_comes_back_goes_on_from_what_it_wrote(begun, open_store):
    begun.contribute(FIRST, "a", "a1", {"n": 2})
    back = open_store()
    assert back.adopt(FIRST, "a", "a2") == {"n": 2}
    back.contribute(FIRST, "a", "a2", {"n": 3})
    assert back.evidence(FIRST) == {"a": {"n": 3}}
    assert back.adopt(FIRST, "new", "n1") is None


def test_a_second_process_of_the_same_name_is_noticed(begun, open_store):
    begun.contribute(FIRST, "a", "a1", {"n": 2})
    with pytest.raises(StoreConflict, match="names must be unique"):
        open_store().contribute(FIRST, "a", "other", {"n": 900})
    open_store().adopt(FIRST, "a", "a2")
    with pytest.raises(StoreConflict, match="names must be unique"):
        begun.contribute(FIRST, "a", "a1", {"n": 900})
    assert begun.evidence(FIRST) == {"a": {"n": 2}}


def test_with_the_next_step_evidence_begins_anew(begun):
    begun.contribute(FIRST, "a", "a1", {"n": 2})
    beyond = replace(BEGUN.progress, step=1, weight=25)
    begun.commit(beyond, [], revision=1, lease=None)
    assert begun.evidence(FIRST) == {}
    with pytest.raises(StoreConflict, match="now is"):
        begun.contribute(FIRST, "a", "a1", {"n": 3})
    begun.contribute(Epoch(1, 1), "a", "a1", {"n": 1})
    assert begun.evidence(Epoch(1, 1)) == {"a": {"n": 1}}


def test_evidence_survives_a_commit_within_its_step(begun):
    begun.contribute(FIRST, "a", "a1", {"n": 2})
    begun.commit(HELD.progress, [HOLD], revision=1, lease=None)
    assert begun.evidence(FIRST) == {"a": {"n": 2}}


def test_too_many_gateways_are_refused(begun):
    with begun.transaction() as execute:
        for number in range(MOST_GATEWAYS):
            execute(
                "INSERT INTO disagg_canary_evidence VALUES (?, 1, 0, ?, 'w', '{}')",
                (begun._canary, f"g{number}"),
            )
    with pytest.raises(StoreConflict, match="256 gateways"):
        begun.contribute(FIRST, "one-more", "w", {})
    assert len(begun.evidence(FIRST)) == MOST_GATEWAYS


def test_too_long_evidence_is_refused(begun):
    with pytest.raises(StoreConflict, match="bytes"):
        begun.contribute(FIRST, "a", "a1", {"n": "x" * (5 << 20)})


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "{" * 100_000, '{"phase": "running"}'])
def test_damaged_progress_is_an_error_and_not_a_new_beginning(begun, text):
    from disagg_plugins.errors import DamagedState

    with begun.transaction() as execute:
        execute(
            "UPDATE disagg_canary_progress SET progress = ? WHERE canary = ?",
            (text, begun._canary),
        )
    with pytest.raises(DamagedState):
        begun.load()


def test_tables_of_a_later_version_are_left_alone(begun, open_store):
    with begun.transaction() as execute:
        execute("UPDATE disagg_canary_schema SET version = 2", ())
    try:
        with pytest.raises(StoreConflict, match="upgrade"):
            open_store().load()
    finally:
        with begun.transaction() as execute:
            execute("UPDATE disagg_canary_schema SET version = 1", ())


def test_closing_twice_is_fine_and_the_next_use_opens_again(begun):
    begun.close()
    begun.close()
    assert begun.load().revision == 1
