"""What becomes of a worker that answers right and far slower than its peers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins.cli.top import Look, table
from disagg_plugins.gateway.fleet import FleetState
from disagg_plugins.gateway.outliers import ENOUGH_ANSWERS
from disagg_plugins.gateway.slow_workers import LEAST_TOKENS, SlowWorkers
from disagg_plugins.telemetry.metrics import Metrics
from disagg_plugins.telemetry.records import FailureRecord
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_plugins.types import Role, Worker
from disagg_vllm.dialect import VllmDialect
from tests.gateway.harness import LONG, SHORT, Stack, eventually
from tests.gateway.slow_world import record

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord

Build = Callable[..., Stack]

QUICK_S, SLOW_S = 0.02, 0.3


class Room:
    """Four decode workers, two prefill workers, and who watches them."""

    def __init__(self, *, decode: int = 4, labels: dict[str, dict[str, str]] | None = None) -> None:
        roles = {**{f"d{n}": Role.DECODE for n in range(decode)}, "p0": Role.PREFILL}
        workers = tuple(
            Worker(name, f"http://127.0.0.1:{n}", "vllm", role, 64, (labels or {}).get(name, {}))
            for n, (name, role) in enumerate(roles.items(), 8000)
        )
        dialects = {"vllm": VllmDialect()}
        self.fleet = FleetState(workers, dialects, model=None, unhealthy_after=1)
        for name in roles:
            self.fleet.probe_ok(name, ("m",))
        self.metrics = Metrics()
        self.slow = SlowWorkers(self.fleet, self.metrics, 5.0)
        self.now_s = 100.0

    def answers(self, name: str, tpot_s: float, times: int = ENOUGH_ANSWERS, **more: Any) -> None:
        for _ in range(times):
            told = record(decode=name, **{"output_tokens": 20, **more})
            told.tpot_s, told.ttft_s, told.e2e_s = tpot_s, 0.01, 0.01 + 19 * tpot_s
            self.ends(told)

    def ends(self, told: RequestRecord) -> None:
        self.now_s += 0.01
        self.slow.ended(self.now_s, told)

    def peers_are_quick(self, *names: str) -> None:
        for name in names or [n for n in self.fleet.states if n not in ("d0", "p0")]:
            self.answers(name, QUICK_S)

    def out(self) -> list[str]:
        return [name for name, state in self.fleet.states.items() if not state.healthy]


def test_a_slow_worker_rests_and_why_is_told(caplog: pytest.LogCaptureFixture) -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    assert room.out() == ["d0"]
    state = room.fleet.states["d0"]
    assert (state.slow, state.outs, state.relapses, state.failed) == (True, 1, 1, {})
    assert state.reason == state.last_problem
    assert state.reason == (
        "slow: its TPOT of 0.3 s (median of 16) is 15.0 times what its load explains beside 3 "
        "peers with 0.02 s (policy key gateway.slow_factor)"
    )
    assert f"worker d0 rests: it is {state.reason}" in caplog.text
    assert room.metrics.value("disagg_slow_outs", ("d0", "TPOT")) == 1
    assert b"disagg_slow_workers 1.0" in room.metrics.text()
    assert "d0" not in [w.name for w in room.fleet.view().serving(Role.DECODE)]


def test_a_worker_that_comes_back_is_on_trial_and_no_longer_counted_as_slow() -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    room.fleet.probe_ok("d0", ("m",))
    state = room.fleet.states["d0"]
    assert (state.healthy, state.trial, state.slow) == (True, True, False)


def test_each_time_in_a_row_it_rests_longer_until_it_is_as_quick_as_its_peers() -> None:
    room = Room()
    state = room.fleet.states["d0"]
    for relapses in (1, 2, 3):
        room.peers_are_quick()
        room.now_s += 10.0  # what it begins now is begun after it came back
        room.answers("d0", SLOW_S)
        assert (state.healthy, state.relapses) == (False, relapses)
        room.fleet.probe_ok("d0", ("m",))
    room.now_s += 10.0
    room.peers_are_quick()
    room.answers("d0", QUICK_S)
    assert state.slow_outs == 0
    room.answers("d0", SLOW_S, times=2 * ENOUGH_ANSWERS)
    assert state.slow_outs == 1


def test_answers_that_end_while_it_rests_do_not_shorten_the_rest() -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    for _ in range(20):
        room.fleet.succeeded("d0")
    assert room.fleet.states["d0"].relapses == 1


def test_what_it_began_before_it_rested_says_nothing_of_it_afterwards() -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    room.fleet.probe_ok("d0", ("m",))
    room.answers("d0", SLOW_S)  # each took 5.7 s and ends at once
    assert room.out() == []


def test_streams_without_usage_are_judged_by_their_pieces() -> None:
    room = Room()
    for name in ("d1", "d2", "d3", "d0"):
        seconds = SLOW_S if name == "d0" else QUICK_S
        for _ in range(ENOUGH_ANSWERS):
            told = record(decode=name)
            told.gaps_s, told.ttft_s, told.e2e_s = [seconds] * 19, 0.01, 0.01 + 19 * seconds
            room.ends(told)
    assert room.out() == ["d0"]
    assert "time for a piece of an answer of 0.3 s" in room.fleet.states["d0"].reason


def test_prefill_workers_are_judged_by_the_prompts_they_read() -> None:
    room = Room()
    for name in ("p1", "p2", "p3"):
        room.fleet.add(Worker(name, f"http://127.0.0.1:1{name[1:]}", "vllm", Role.PREFILL))
        room.fleet.probe_ok(name, ("m",))
    for name in ("p1", "p2", "p3", "p0"):
        for _ in range(ENOUGH_ANSWERS):
            told = record(prefill=name, decode="d0", prompt_tokens_estimate=1000)
            told.prefill_s = 2.0 if name == "p0" else 0.1
            room.ends(told)
    assert room.out() == ["p0"]
    assert "time to read prompts" in room.fleet.states["p0"].reason


@pytest.mark.parametrize(
    "more",
    [
        {"outcome": "failed"},
        {"retries": 1},
        {"resumes": 1},
        {"failures": [FailureRecord("d1", "decode", "http_500", "")]},
        {"stream": False},
        {"output_tokens": LEAST_TOKENS - 1},
    ],
)
def test_only_streams_that_went_well_at_once_count(more: dict[str, object]) -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S, **more)
    assert room.out() == []


def test_unlike_hardware_is_not_compared() -> None:
    room = Room(labels={"d0": {"hardware": "old"}})
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    assert room.out() == []


def test_at_most_a_third_of_a_role_rests_for_slowness(caplog: pytest.LogCaptureFixture) -> None:
    room = Room()
    room.peers_are_quick("d2", "d3")
    room.answers("d0", SLOW_S)
    room.peers_are_quick("d2", "d3")
    room.answers("d1", SLOW_S, times=3 * ENOUGH_ANSWERS)
    assert room.out() == ["d0"]
    assert caplog.text.count("it stays in use: 1 of 4 decode workers rest for slowness") == 1


def test_nobody_rests_for_slowness_where_half_of_a_role_would_be_left_or_less() -> None:
    room = Room()
    room.peers_are_quick()
    for ill in ("d2", "d3"):
        room.fleet.failed(ill, "refused", "nobody listens")
    room.answers("d0", SLOW_S)
    assert room.out() == ["d2", "d3"]


def test_nobody_rests_for_slowness_while_the_least_bad_one_is_in_use() -> None:
    room = Room(decode=7)
    room.peers_are_quick()
    room.fleet.states["d6"].kept = True
    room.answers("d0", SLOW_S)
    assert room.out() == []


def test_a_slow_worker_is_used_all_the_same_when_all_others_are_ill() -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    for ill in ("d1", "d2", "d3"):
        room.fleet.failed(ill, "refused", "nobody listens")
    assert [w.name for w in room.fleet.view().serving(Role.DECODE)] == ["d0"]


def test_nothing_is_kept_of_a_worker_that_left() -> None:
    room = Room()
    room.peers_are_quick()
    room.answers("d0", SLOW_S)
    for name in ("d0", "d1", "d2", "d3"):
        room.fleet.remove(name)
        room.slow.gone(name)
    assert all(not outliers._workers for outliers in room.slow._all)
    assert room.metrics.counts("disagg_slow_outs") == {}
    room.answers("d0", SLOW_S)  # the end of a request that it had


# Through a gateway

LONGER = {
    "stream": True,
    "max_tokens": 2 * LEAST_TOKENS,
    "stream_options": {"include_usage": True},
}
FLOWS = Behaviour(chunk_s=0.002)
TRICKLES = Behaviour(chunk_s=0.03)
FOUR = {f"d{n}": "decode" for n in range(4)}


def ask(stack: Stack, times: int, prompt: str = SHORT, **more: object) -> None:
    """Let eight clients at once get so many right answers."""
    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(stack.complete, prompt, **{**LONGER, **more}) for _ in range(times)]
        answers = [each.result() for each in asked]
    assert all(status == 200 and b"[DONE]" in body for status, body in answers)


def asked_until(stack: Stack, check: Callable[[], object], what: str, **more: object) -> None:
    def more_asked() -> object:
        ask(stack, 16, **more)  # type: ignore[arg-type]
        return check()

    eventually(more_asked, what, 30.0)


def test_a_slow_decode_worker_is_taken_out_and_others_answer(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stack = build(
        **FOUR,
        gateway={"rest_s": 40.0},
        behaviours={**dict.fromkeys(FOUR, FLOWS), "d0": TRICKLES},
    )
    state = stack.gateway.fleet.states["d0"]
    asked_until(stack, lambda: not state.healthy, "d0 is out")
    stack.wait_idle()
    served = stack.engines["d0"].seen.requests
    ask(stack, 40)
    assert stack.engines["d0"].seen.requests == served
    assert all(stack.gateway.fleet.states[name].outs == 0 for name in ("d1", "d2", "d3"))
    assert "worker d0 rests: it is slow" in caplog.text
    assert stack.metric("disagg_slow_outs") == 1
    status = stack.status()
    assert "d0: slow: its" in "\n".join(table(Look(status, 1.0)))
    _, _, body = stack.request("GET", "/internal/workers/d0")
    assert json.loads(body)["reason"].startswith("slow: its")


def test_a_worker_that_is_quick_again_comes_back_and_stays(build: Build) -> None:
    stack = build(
        **FOUR,
        gateway={"rest_s": 0.5},
        behaviours={**dict.fromkeys(FOUR, FLOWS), "d0": TRICKLES},
    )
    state = stack.gateway.fleet.states["d0"]
    asked_until(stack, lambda: state.outs, "d0 is out")
    stack.engines["d0"].behaviour = FLOWS
    eventually(lambda: state.healthy, "d0 is back")
    outs, served = state.outs, stack.engines["d0"].seen.requests
    asked_until(stack, lambda: state.slow_outs == 0, "it is found quick")
    ask(stack, 200)
    assert state.outs == outs
    assert all(stack.gateway.fleet.states[name].outs == 0 for name in ("d1", "d2", "d3"))
    assert stack.engines["d0"].seen.requests - served > 30


def test_a_slow_prefill_worker_is_taken_out(build: Build) -> None:
    stack = build(
        **{f"p{n}": "prefill" for n in range(4)},
        d0="decode",
        gateway={"rest_s": 40.0},
        behaviours={"p0": Behaviour(first_s=0.15)},
    )
    state = stack.gateway.fleet.states["p0"]
    asked_until(stack, lambda: not state.healthy, "p0 is out", prompt=LONG, max_tokens=2)
    assert "time to read prompts" in state.reason
