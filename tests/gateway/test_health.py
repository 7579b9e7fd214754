"""What probes find: engines that are dead behind a server that answers, trials, rests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.gateway.worker_state import (
    MAX_RELAPSES,
    STEADY_SUCCESSES,
    WorkerState,
    rest_of,
)
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_plugins.types import Role, Worker
from tests.gateway.harness import SHORT, Stack, eventually
from tests.gateway.test_rendezvous import DependentDialect, RoomPlugin

if TYPE_CHECKING:
    from disagg_plugins.gateway.pool import WorkerPool

Build = Callable[..., Stack]
PROBING = {
    "probe_s": 0.05,
    "probe_generate_s": 0.1,
    "probe_generate_timeout_s": 0.1,
    "rest_s": 0.05,
    "rest_max_s": 0.2,
}
HANGS = Behaviour(hang="head")


def test_an_engine_that_hangs_behind_a_live_server_goes_out_and_comes_back(build: Build) -> None:
    stack = build(d0="decode", d1="decode", gateway=PROBING)
    state = stack.gateway.fleet.states["d0"]
    stack.engines["d0"].behaviour = HANGS
    eventually(lambda: not state.healthy, "d0 is out")
    assert "no answer to POST /v1/completions" in state.reason
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4  # nobody waits for it
    stack.engines["d0"].behaviour = Behaviour()
    eventually(lambda: state.healthy, "d0 is back")


def test_only_a_worker_that_goes_out_is_a_warning(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "disagg_plugins")
    stack = build(d0="decode", d1="decode")
    state = stack.gateway.fleet.states["d0"]
    stack.engines["d0"].healthy = False
    eventually(lambda: not state.healthy, "d0 is out")
    stack.engines["d0"].healthy = True
    eventually(lambda: state.healthy, "d0 is back")

    def told() -> set[tuple[str, str]]:
        said = [(r.levelname, r.getMessage()) for r in caplog.records]
        return {(level, line.split(":")[0]) for level, line in said if "worker d0" in line}

    wanted = {("WARNING", "worker d0 is not healthy"), ("INFO", "worker d0 is healthy")}
    eventually(lambda: told() == wanted, "both are told, each in its place")


@pytest.mark.parametrize(
    "behaviour", [Behaviour(status=500), Behaviour(garbage="body"), Behaviour(close="head")]
)
def test_an_engine_that_answers_a_token_wrongly_goes_out(
    build: Build, behaviour: Behaviour
) -> None:
    stack = build(d0="decode", d1="decode", gateway=PROBING, behaviours={"d0": behaviour})
    state = stack.gateway.fleet.states["d0"]
    eventually(lambda: state.outs and not state.healthy, "d0 is out")


def test_an_engine_without_the_api_of_the_probe_stays_in(build: Build) -> None:
    stack = build(d0="decode", gateway=PROBING, behaviours={"d0": Behaviour(status=404)})
    engine, state = stack.engines["d0"], stack.gateway.fleet.states["d0"]
    eventually(lambda: engine.seen.requests >= 3, "it was asked")
    assert (state.healthy, state.outs) == (True, 0)


def test_probes_for_a_token_are_not_in_the_numbers_of_users(build: Build) -> None:
    stack = build(d0="decode", gateway=PROBING)
    eventually(lambda: stack.engines["d0"].seen.requests >= 2, "it was asked")
    assert stack.metric("disagg_requests") == 0
    state = stack.gateway.fleet.states["d0"]
    assert (state.served, state.requests) == (0, 0)
    assert stack.engines["d0"].seen.bodies[-1]["max_tokens"] == 1


def test_a_worker_that_serves_is_not_asked(build: Build) -> None:
    stack = build(d0="decode", gateway={**PROBING, "probe_generate_s": 60.0})
    engine = stack.engines["d0"]
    assert [stack.complete(SHORT)[0] for _ in range(5)] == [200] * 5
    assert engine.seen.requests == 5


def test_a_worker_that_failed_is_asked_though_its_time_has_not_come(build: Build) -> None:
    stack = build(
        d0="decode",
        gateway={**PROBING, "probe_generate_s": 60.0},
        behaviours={"d0": Behaviour(status=500, times=2)},
    )
    assert stack.complete(SHORT)[0] == 502
    engine, state = stack.engines["d0"], stack.gateway.fleet.states["d0"]
    eventually(lambda: engine.seen.requests >= 3 and not state.failures, "it was asked")


def test_a_worker_that_takes_handed_over_requests_only_is_not_asked(build: Build) -> None:
    stack = build(gateway=PROBING, dialects=RoomPlugin(DependentDialect()))
    probes = stack.gateway.prober
    state = stack.gateway.fleet.states["d0"]
    assert not state.worker.whole
    from disagg_plugins.gateway.health import _Seen

    assert not probes._is_due(state, _Seen())
    assert stack.engines["d0"].seen.requests == 0


def test_a_worker_that_comes_back_gets_one_request_at_a_time_until_one_succeeds(
    build: Build,
) -> None:
    stack = build(d0="decode", d1="decode")
    state = stack.gateway.fleet.states["d0"]
    stack.engines["d0"].healthy = False
    eventually(lambda: not state.healthy, "d0 is out")
    stack.engines["d0"].healthy = True
    eventually(lambda: state.healthy, "d0 is back")
    assert state.trial
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert not state.trial


def test_a_probe_that_was_on_its_way_does_not_bring_back_who_went_out_meanwhile(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = build(d0="decode", d1="decode", gateway={"probe_s": 0.05, "rest_s": 40.0})
    fleet, prober = stack.gateway.fleet, stack.gateway.prober
    state, asked = fleet.states["d0"], prober._models

    async def goes_out(pool: WorkerPool) -> tuple[str, ...]:
        models = await asked(pool)
        if pool.worker.name == "d0" and not state.outs:
            fleet.slow("d0", "slow")
        return models

    monkeypatch.setattr(prober, "_models", goes_out)
    eventually(lambda: state.outs, "d0 was taken out during a probe")
    signs = stack.engines["d1"].seen.requests
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert stack.engines["d1"].seen.requests == signs + 4
    assert (state.healthy, state.slow) == (False, True)


def test_each_relapse_doubles_the_rest_up_to_a_bound() -> None:
    assert [rest_of(n, 2.0, 10.0) for n in range(5)] == [0.0, 2.0, 4.0, 8.0, 10.0]
    assert rest_of(MAX_RELAPSES, 2.0, 60.0) == 60.0


def worker_state() -> WorkerState:
    worker = Worker("a", "http://127.0.0.1:1", "vllm", Role.BOTH)
    return WorkerState(worker, worker)


def test_a_relapse_is_to_fall_ill_again_soon_after_coming_back() -> None:
    state = worker_state()
    state.back()
    for expected in (0, 1, 2):
        state.out("ill")
        assert state.relapses == expected
        state.out("still ill")
        assert state.relapses == expected
        state.back()
        assert state.trial
    state.succeeded()
    assert (state.trial, state.relapses) == (False, 2)
    for _ in range(STEADY_SUCCESSES):
        state.succeeded()
    assert state.relapses == 0
    state.out("ill")
    assert state.relapses == 0


def test_a_worker_that_relapses_rests_before_it_is_probed_again(build: Build) -> None:
    stack = build(
        d0="decode",
        d1="decode",
        gateway={"probe_s": 0.05, "unhealthy_after": 1, "rest_s": 40.0, "rest_max_s": 60.0},
    )
    engine, state = stack.engines["d0"], stack.gateway.fleet.states["d0"]
    engine.behaviour = Behaviour(status=500, times=2)

    def relapsed() -> bool:
        assert stack.complete(SHORT)[0] == 200
        return state.relapses == 1

    eventually(relapsed, "d0 fell ill twice")
    assert not state.healthy
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert not state.healthy
