"""One session, one worker."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.scheduling.ring import Ring
from disagg_plugins.scheduling.session_affinity import SessionAffinity
from disagg_plugins.scheduling.session_places import MAX_PLACES
from disagg_plugins.types import FleetIndex, FleetView, RequestProfile, Role, Worker, WorkerLoad

WORKERS = tuple(Worker(f"w{i}", f"http://127.0.0.1:{i}", "vllm", Role.BOTH) for i in range(1, 9))


def profile(session):
    return RequestProfile("r", "/v1/completions", "m", 400, session=session)


def chosen(session, role=Role.DECODE, other=None, sick=(), plugin=None):
    loads = {name: WorkerLoad(healthy=False) for name in sick}
    fleet = FleetView(WORKERS, loads)
    healthy = [w for w in WORKERS if w.name not in sick]
    plugin = plugin or SessionAffinity()
    scores = plugin.disagg_score_workers(profile(session), role, healthy, fleet, other)
    assert sorted(scores.values()) == [0.0] * (len(healthy) - 1) + [1.0]
    return max(scores, key=scores.get)


def test_a_session_stays_and_sessions_spread():
    found = {f"s{n}": chosen(f"s{n}") for n in range(200)}
    assert found == {session: chosen(session) for session in found}
    assert max(Counter(found.values()).values()) < 3 * 200 / len(WORKERS)


def test_only_the_sessions_of_a_sick_worker_move():
    before = {f"s{n}": chosen(f"s{n}") for n in range(100)}
    after = {session: chosen(session, sick=("w3",)) for session in before}
    assert {s for s in before if before[s] != after[s]} == {s for s in before if before[s] == "w3"}


def test_prefill_and_decode_of_one_session_are_two_workers():
    by_name = {w.name: w for w in WORKERS}
    for n in range(50):
        decode = by_name[chosen(f"s{n}")]
        assert chosen(f"s{n}", Role.PREFILL, other=decode) != decode.name


def test_the_sessions_worker_is_nominated_in_a_large_fleet():
    plugin = SessionAffinity()
    fleet = FleetView(WORKERS, {})
    for n in range(20):
        first, *_ = plugin.disagg_nominate_workers(profile(f"s{n}"), Role.DECODE, fleet)
        assert first == chosen(f"s{n}")


def test_no_session_is_no_opinion():
    fleet = FleetView(WORKERS, {})
    plugin = SessionAffinity()
    assert plugin.disagg_score_workers(profile(None), Role.DECODE, WORKERS, fleet, None) is None
    assert plugin.disagg_nominate_workers(profile(None), Role.DECODE, fleet) is None


def test_a_session_whose_worker_may_not_take_it_is_no_opinion():
    home = chosen("s1")
    others = [w for w in WORKERS if w.name != home]
    fleet = FleetView(WORKERS, {})
    plugin = SessionAffinity()
    scores = plugin.disagg_score_workers(profile("s1"), Role.DECODE, others, fleet, None)
    assert scores is None


def test_nobody_is_found_on_an_empty_ring():
    assert list(Ring(()).walk("s")) == []


@st.composite
def changes(draw):
    """Sick workers, one set after the other, with sessions asked about in between."""
    names = st.sets(st.sampled_from([w.name for w in WORKERS]), max_size=6)
    return draw(st.lists(names, min_size=1, max_size=5))


@given(changes())
def test_what_is_remembered_is_what_the_ring_says_whoever_falls_ill(sick_sets):
    plugin = SessionAffinity()
    for sick in sick_sets:
        loads = {name: WorkerLoad(healthy=False) for name in sick}
        ready = tuple(w for w in WORKERS if w.name not in sick)
        index = FleetIndex(dict.fromkeys(Role, ready), {w.name: w for w in WORKERS}, {})
        indexed, plain = FleetView(WORKERS, loads, index=index), FleetView(WORKERS, loads)
        for session in ["s1", "s2", "s1"]:
            for role in (Role.PREFILL, Role.DECODE):
                arguments = profile(session), role
                nominated = plugin.disagg_nominate_workers(*arguments, indexed)
                assert nominated == SessionAffinity().disagg_nominate_workers(*arguments, plain)


def test_places_are_remembered_bounded():
    plugin = SessionAffinity()
    index = FleetIndex(dict.fromkeys(Role, WORKERS), {}, {})
    for n in range(2 * MAX_PLACES + 10):
        plugin.disagg_nominate_workers(
            profile(f"s{n}"), Role.DECODE, FleetView(WORKERS, {}, index=index)
        )
    assert len(plugin._places._places[Role.DECODE].of) <= MAX_PLACES
