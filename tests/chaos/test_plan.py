from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.plan import asks, faults, gateway_faults

NAMES = ("p0", "p1", "d0", "d1")


@given(st.integers(0, 10**6))
def test_a_seed_gives_the_same_schedule_again(seed: int) -> None:
    assert faults(seed, NAMES, NAMES[:1], 20.0, 0.3) == faults(seed, NAMES, NAMES[:1], 20.0, 0.3)
    assert asks(seed, 30, 1.0) == asks(seed, 30, 1.0)


@given(st.integers(0, 10**6))
def test_a_worker_has_one_fault_at_a_time_and_proxies_faults_only_with_a_proxy(seed: int) -> None:
    found = faults(seed, NAMES, NAMES[:1], 20.0, 0.1)
    assert all(f.target == "p0" for f in found if f.kind in ("reset", "cut", "slow"))
    for name in NAMES:
        mine = [f for f in found if f.target == name]
        assert all(a.at_s + a.for_s <= b.at_s for a, b in itertools.pairwise(mine))


def test_no_two_requests_have_the_same_prompt() -> None:
    bodies = [a.body for a in asks(1, 500, 10.0)]
    assert len(set(bodies)) == 500


def test_the_first_gateway_stays() -> None:
    assert {f.target for f in gateway_faults(("g0", "g1"), 9.0)} == {"g1"}
