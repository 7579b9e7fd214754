"""Which workers are far slower than their peers, and which only have more to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.gateway.outliers import (
    ANSWERS_ANEW,
    ENOUGH_ANSWERS,
    JUDGED_EVERY,
    MOST_ANSWERS,
    TPOT,
    YOUNG_S,
    Answer,
    Outliers,
)
from disagg_plugins.types import Role
from tests.gateway.slow_world import (
    World,
    at_random,
    half_to_the_first,
    least_loaded,
    long_to_the_first,
)

if TYPE_CHECKING:
    from disagg_plugins.gateway.outliers import Verdict
    from tests.gateway.slow_world import Pick

LOADS = (4.0, 4000.0, 0.0)


def tell(
    outliers: Outliers,
    name: str,
    seconds: float,
    *,
    times: int = ENOUGH_ANSWERS,
    at_s: float = 0.0,
    loads: tuple[float, ...] = LOADS,
    group: str = "decode",
    began_s: float | None = None,
) -> Verdict | None:
    """Return the last verdict on so many equal answers."""
    last = None
    for _ in range(times):
        answer = Answer(at_s, seconds, loads)
        began = at_s - 1.0 if began_s is None else began_s
        last = outliers.hear(group, name, answer, began_s=began) or last
    return last


def beside(*peers_s: float, factor: float = 5.0) -> Outliers:
    """Return the judge of a worker beside peers that take so long."""
    outliers = Outliers(TPOT, factor)
    for number, seconds in enumerate(peers_s):
        tell(outliers, f"peer{number}", seconds)
    return outliers


def test_a_worker_ten_times_slower_than_its_peers_is_slow() -> None:
    verdict = tell(beside(0.02, 0.02, 0.03), "w", 0.2)
    assert verdict is not None
    assert verdict.slow
    assert not verdict.quick
    assert (verdict.ratio, verdict.peers, verdict.peers_s) == (pytest.approx(10.0), 3, 0.02)


def test_a_worker_somewhat_slower_than_its_peers_is_not_slow_and_not_quick() -> None:
    verdict = tell(beside(0.02, 0.02), "w", 0.08)
    assert verdict is not None
    assert (verdict.slow, verdict.quick) == (False, False)


def test_a_worker_as_quick_as_its_peers_is_quick() -> None:
    verdict = tell(beside(0.02, 0.02), "w", 0.03)
    assert verdict is not None
    assert (verdict.slow, verdict.quick) == (False, True)


def test_one_peer_is_not_enough_to_know_who_is_odd() -> None:
    assert tell(beside(0.02), "w", 2.0) is None


def test_few_answers_say_nothing() -> None:
    assert tell(beside(0.02, 0.02), "w", 2.0, times=ENOUGH_ANSWERS - 1) is None


def test_peers_of_few_answers_are_none() -> None:
    outliers = beside(0.02)
    tell(outliers, "q", 0.02, times=ENOUGH_ANSWERS - 1)
    assert tell(outliers, "w", 2.0) is None


def test_the_smaller_ratio_of_two_peers_counts() -> None:
    verdict = tell(beside(0.02, 0.1), "w", 0.2)
    assert verdict is not None
    assert not verdict.slow


def test_one_quick_peer_of_three_makes_nobody_slow() -> None:
    verdict = tell(beside(0.002, 0.02, 0.02), "w", 0.03)
    assert verdict is not None
    assert verdict.quick


def test_old_answers_do_not_count() -> None:
    outliers = beside(0.02, 0.02)
    later_s = YOUNG_S + 1.0
    assert tell(outliers, "w", 2.0, at_s=later_s) is None, "the peers' are old"
    for peer in ("peer0", "peer1"):
        tell(outliers, peer, 0.02, at_s=later_s)
    verdict = tell(outliers, "w", 2.0, at_s=later_s, times=JUDGED_EVERY)
    assert verdict is not None
    assert verdict.slow


def test_workers_of_another_role_or_kind_are_no_peers() -> None:
    outliers = beside(0.02, 0.02)
    assert tell(outliers, "w", 2.0, group="another") is None


def test_a_worker_that_changes_its_role_is_judged_anew_and_no_peer_of_its_old_ones() -> None:
    outliers = beside(0.02, 0.02)
    tell(outliers, "peer1", 0.02, times=ENOUGH_ANSWERS - 1, group="another")
    assert tell(outliers, "w", 2.0) is None


def test_most_of_the_last_answers_must_be_slow() -> None:
    outliers = beside(0.02, 0.02)
    tell(outliers, "w", 0.02, times=MOST_ANSWERS)
    verdict = tell(outliers, "w", 0.2, times=MOST_ANSWERS // 2 - JUDGED_EVERY)
    assert verdict is not None
    assert not verdict.slow
    verdict = tell(outliers, "w", 0.2, times=2 * JUDGED_EVERY)
    assert verdict is not None
    assert verdict.slow


def test_who_was_slow_is_judged_anew_by_fewer_answers_and_not_by_what_it_began_before() -> None:
    outliers = beside(0.02, 0.02)
    tell(outliers, "w", 2.0)
    outliers.rests("w", 10.0)
    assert tell(outliers, "w", 2.0, at_s=20.0, times=MOST_ANSWERS, began_s=9.0) is None
    verdict = tell(outliers, "w", 0.02, at_s=20.0, times=ANSWERS_ANEW, began_s=15.0)
    assert verdict is not None
    assert not verdict.quick, "not yet: by few answers"
    verdict = tell(outliers, "w", 0.02, at_s=20.0, times=ANSWERS_ANEW, began_s=15.0)
    assert verdict is not None
    assert verdict.quick


def test_who_rests_is_nobodys_peer() -> None:
    outliers = beside(0.02, 0.02)
    outliers.rests("peer0", 0.0)
    assert tell(outliers, "w", 2.0) is None


def test_nothing_is_kept_of_who_left() -> None:
    outliers = beside(0.02, 0.02)
    for name in ("peer0", "peer1", "never there"):
        outliers.gone(name)
    assert (outliers._workers, outliers._groups) == ({}, {})


def test_times_that_the_network_makes_are_not_compared() -> None:
    verdict = tell(beside(0.0, 0.0001), "w", 0.004)
    assert verdict is not None
    assert not verdict.slow


@pytest.mark.parametrize(
    "loads", [(64.0, 4000.0, 0.0), (4.0, 90_000.0, 0.0), (4.0, 4000.0, 2000.0)]
)
def test_a_worker_with_more_requests_longer_contexts_or_more_prompts_may_be_slower(
    loads: tuple[float, ...],
) -> None:
    slow = tell(beside(0.02, 0.02, factor=2.0), "w", 0.05)
    busy = tell(beside(0.02, 0.02, factor=2.0), "w", 0.05, loads=loads)
    assert slow is not None
    assert slow.slow
    assert busy is not None
    assert not busy.slow


COSTS = st.tuples(*[st.floats(0.0, 1.0)] * 3)
LOAD = st.tuples(st.floats(1, 256), st.floats(1, 1e6), st.floats(0, 4096))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(COSTS, st.tuples(LOAD, LOAD, LOAD))
def test_whatever_a_load_costs_equal_workers_are_not_slow(
    costs: tuple[float, ...], loads: tuple[tuple[float, ...], ...]
) -> None:
    def takes(load: tuple[float, ...]) -> float:
        parts = zip(costs, load, TPOT.idle, strict=True)
        # what is always there: as much as the idle part of each load costs, and more
        return 0.01 + sum(0.02 * cost * (part + idle) / idle for cost, part, idle in parts)

    outliers = Outliers(TPOT, 1.001)
    for name, load in zip("abc", loads, strict=True):
        verdict = tell(outliers, name, takes(load), loads=load)
    assert verdict is not None
    assert not verdict.slow


def test_a_verdict_costs_the_same_among_thousands() -> None:
    outliers = beside(*[0.02] * 200)
    verdict = tell(outliers, "w", 0.2)
    assert verdict is not None
    assert verdict.slow
    assert verdict.peers == 32


# Fleets of pretend engines in virtual time

PICKS = (least_loaded, at_random, half_to_the_first, long_to_the_first)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("role", [Role.DECODE, Role.PREFILL])
@pytest.mark.parametrize("per_s", [2.0, 16.0])
def test_identical_workers_under_random_load_are_never_taken_out(
    pick: Pick, role: Role, per_s: float
) -> None:
    world = World(4, role=role, pick=pick, seed=11).run(600, per_s)
    assert sum(world.ended.values()) == 600
    assert world.outs == []


def test_identical_workers_at_the_end_of_their_forces_are_never_taken_out() -> None:
    world = World(6, pick=half_to_the_first, profile="cpu-vllm", seed=3).run(600, 6.0)
    assert world.outs == []


def test_a_tight_factor_takes_out_no_worker_for_its_load_alone() -> None:
    assert World(4, pick=long_to_the_first, seed=5, factor=3.0).run(800, 8.0).outs == []


@pytest.mark.parametrize("role", [Role.DECODE, Role.PREFILL])
def test_a_worker_ten_times_slower_is_out_after_few_answers(role: Role) -> None:
    world = World(4, role=role, slower={"w1": 10.0}, seed=1).run(1500, 10.0)
    name, _, answers, reason = world.outs[0]
    assert name == "w1"
    assert answers <= MOST_ANSWERS
    assert "gateway.slow_factor" in reason
    assert {who for who, _, _, _ in world.outs} == {"w1"}


def test_a_worker_that_stays_slow_rests_longer_each_time() -> None:
    world = World(4, role=Role.PREFILL, slower={"w1": 10.0}, seed=1).run(3000, 20.0)
    times_s = [at_s for _, at_s, _, _ in world.outs]
    gaps_s = [b - a for a, b in zip(times_s, times_s[1:], strict=False)]
    assert len(gaps_s) >= 3
    assert all(gap_s > 2.0**n for n, gap_s in enumerate(gaps_s, 1))


def test_a_worker_that_becomes_slow_goes_and_one_that_is_quick_again_stays() -> None:
    world = World(4, seed=2).run(600, 20.0)
    assert world.outs == []
    world.slower["w1"] = 10.0
    world.run(400, 20.0)
    outs = len(world.outs)
    assert {name for name, _, _, _ in world.outs} == {"w1"}
    world.slower.clear()
    served = world.ended["w1"]
    world.run(1500, 20.0)
    assert len(world.outs) <= outs + 1
    assert world.ended["w1"] - served > 150, "it has its share again"
    assert world.fleet.states["w1"].slow_outs == 0


def test_of_two_slow_workers_among_four_one_stays_in() -> None:
    world = World(4, slower={"w1": 10.0, "w2": 10.0}, seed=2)
    out_at_once = 0
    for _ in range(40):
        world.run(40, 20.0)
        out_at_once = max(out_at_once, sum(s.slow for s in world.fleet.states.values()))
    assert out_at_once <= 1


def test_without_a_factor_nobody_is_taken_out() -> None:
    assert World(4, slower={"w1": 50.0}, seed=1, factor=None).run(400, 20.0).outs == []
