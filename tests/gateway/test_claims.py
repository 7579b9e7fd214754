"""Work is given back exactly once, whatever its order of ends."""

from __future__ import annotations

from disagg_plugins.gateway.claims import Claims
from disagg_plugins.gateway.fleet import FleetState, Work
from disagg_plugins.types import Role, Worker


def claimed() -> tuple[FleetState, Claims]:
    worker = Worker("d0", "http://127.0.0.1:1", "vllm", Role.BOTH)
    fleet = FleetState((worker,), {}, model="m", unhealthy_after=3)
    claims = Claims(fleet)
    work = Work(10, 10, 5)
    fleet.begin("d0", work)
    claims.note("decode", "d0", work)
    return fleet, claims


def load(fleet: FleetState) -> tuple[int, int, int]:
    state = fleet.states["d0"]
    return state.requests, state.prompt_tokens, state.kv_tokens


def test_prompt_is_given_back_before_the_rest() -> None:
    fleet, claims = claimed()
    assert load(fleet) == (1, 10, 15)
    claims.prompt_read("decode")
    claims.prompt_read("decode")
    assert load(fleet) == (1, 0, 15)
    claims.leave("decode")
    assert load(fleet) == (0, 0, 0)


def test_leaving_twice_gives_back_once() -> None:
    fleet, claims = claimed()
    assert claims.worker("decode") == "d0"
    claims.succeeded("decode")
    claims.leave("decode")
    claims.leave_all()
    claims.prompt_read("decode")
    assert load(fleet) == (0, 0, 0)
    assert claims.worker("decode") is None
