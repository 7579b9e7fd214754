"""One session, one worker."""

from __future__ import annotations

from collections import Counter

from disagg_plugins.scheduling.ring import Ring
from disagg_plugins.scheduling.session_affinity import SessionAffinity
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

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
