"""Workers come and go: whatever happens, the kept lists say what a look at everyone would find."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg_plugins.gateway.fleet import FleetState
from disagg_plugins.gateway.worker_state import Work
from disagg_plugins.types import Role, Worker
from disagg_sglang.dialect import SglangDialect
from disagg_vllm.dialect import VllmDialect

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Dialect

DIALECTS: dict[str, Dialect] = {"vllm": VllmDialect(), "sglang": SglangDialect()}
NAMES = st.sampled_from("abcdef")
ROLES = st.sampled_from(list(Role))
PHASES = (Role.PREFILL, Role.DECODE)


def make(name: str, role: Role = Role.BOTH, engine: str = "vllm", capacity: int = 2) -> Worker:
    return Worker(name, f"http://127.0.0.1:{8000 + ord(name[0])}", engine, role, capacity)


def empty() -> FleetState:
    return FleetState((), DIALECTS, model=None, unhealthy_after=3)


class Membership(RuleBasedStateMachine):
    """A fleet, and the requests that its workers have or had."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = empty()
        self.given: list[tuple[str, int, Work]] = []

    def there(self, name: str) -> bool:
        return name in self.fleet.states

    @rule(name=NAMES, role=ROLES, engine=st.sampled_from(sorted(DIALECTS)), room=st.integers(1, 3))
    def join(self, name: str, role: Role, engine: str, room: int) -> None:
        if not self.there(name):
            self.fleet.add(make(name, role, engine, room))

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        if self.there(name):
            self.fleet.remove(name)

    @rule(name=NAMES, work=st.builds(Work, *[st.integers(0, 500)] * 3))
    def begin(self, name: str, work: Work) -> None:
        given = self.fleet.begin(name, work)
        if self.there(name):
            self.given.append((name, self.fleet.states[name].order, given))

    @precondition(lambda self: self.given)
    @rule(which=st.integers(0, 99), whole=st.booleans())
    def end(self, which: int, whole: bool) -> None:
        name, order, work = self.given.pop(which % len(self.given))
        if whole:
            self.fleet.end(name, work)
        else:
            self.given.append((name, order, self.fleet.prompt_read(name, work)))

    @rule(name=NAMES)
    def success(self, name: str) -> None:
        self.fleet.succeeded(name)

    @rule(name=NAMES, kind=st.sampled_from(["http_500", "refused", "http_404", "gone"]))
    def failure(self, name: str, kind: str) -> None:
        self.fleet.failed(name, kind, "of a test")

    @rule(name=NAMES, models=st.sampled_from([("m",), ("other",)]))
    def well(self, name: str, models: tuple[str, ...]) -> None:
        if self.there(name):
            self.fleet.probe_ok(name, models)

    @rule(name=NAMES, reachable=st.booleans())
    def sick(self, name: str, reachable: bool) -> None:
        if self.there(name):
            self.fleet.probe_failed(name, "timeout", "of a test", reachable=reachable)

    @rule(name=NAMES, draining=st.booleans())
    def drain(self, name: str, draining: bool) -> None:
        if self.there(name):
            self.fleet.drain(name, draining)

    @rule(name=NAMES, role=ROLES)
    def move(self, name: str, role: Role) -> None:
        if self.there(name):
            self.fleet.set_role(name, role)

    @rule(name=NAMES, capacity=st.integers(1, 3))
    def change(self, name: str, capacity: int) -> None:
        if self.there(name):
            declared = self.fleet.states[name].declared
            self.fleet.change(name, replace(declared, capacity=capacity))

    @rule(name=NAMES, print_=st.sampled_from("xy"))
    def hello(self, name: str, print_: str) -> None:
        said = {"tp_rank": 0, "tp_size": 1, "endpoint": {"at": name}, "fingerprint": print_}
        self.fleet.greet(name, said)

    @invariant()
    def lists_are_what_looking_at_everyone_finds(self) -> None:
        view = self.fleet.view()
        states = self.fleet.states
        assert [w.name for w in view.workers] == list(states)
        assert all(view.worker(w.name) is w is states[w.name].worker for w in view.workers)
        for role in PHASES:
            serving = [s for s in states.values() if s.worker.role.serves(role) and s.takes_work]
            assert [w.name for w in view.serving(role)] == [s.worker.name for s in serving]
            assert view.has_room(role) == any(s.has_room for s in serving)
        assert all(view.loads[name] == state.load() for name, state in states.items())

    @invariant()
    def counts_are_those_of_the_requests_that_are_there(self) -> None:
        for name, state in self.fleet.states.items():
            works = [w for n, order, w in self.given if (n, order) == (name, state.order)]
            assert state.requests == len(works)
            assert state.prompt_tokens == sum(w.prompt_tokens for w in works)
            assert state.prefills == sum(w.prompt_tokens > 0 for w in works)
            assert state.kv_tokens == sum(w.context_tokens + w.output_tokens for w in works)

    @invariant()
    def pair_problems_are_those_of_the_pairs(self) -> None:
        view, found = self.fleet.view(), set()
        for prefill in view.workers:
            for decode in view.workers:
                found.add(self.fleet._pair_problem(prefill, decode))
        assert bool(view.pair_problems) == bool(found - {None})

    @invariant()
    def a_decode_worker_that_answers_is_always_in_use(self) -> None:
        states = [s for s in self.fleet.states.values() if s.worker.role.serves(Role.DECODE)]
        able = [s for s in states if s.reachable and not s.draining]
        assert bool(self.fleet.view().serving(Role.DECODE)) >= bool(able)

    @invariant()
    def nobody_is_on_trial_alone(self) -> None:
        view = self.fleet.view()
        for role in PHASES:
            serving = view.serving(role)
            assert not serving or not all(view.load(w).trial for w in serving)


TestMembership = Membership.TestCase
TestMembership.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def ready(*workers: Worker) -> FleetState:
    fleet = FleetState(workers, DIALECTS, model=None, unhealthy_after=3)
    for worker in workers:
        fleet.probe_ok(worker.name, ("m",))
    return fleet


def test_what_a_worker_still_had_when_it_left_does_not_count_for_the_next_of_its_name() -> None:
    fleet = ready(make("a"))
    old = fleet.begin("a", Work(10, 10, 5))
    fleet.remove("a")
    fleet.end("a", old)  # while nobody has the name
    fleet.add(make("a"))
    new = fleet.begin("a", Work(3, 3, 1))
    fleet.end("a", old)
    assert fleet.states["a"].requests == 1
    fleet.end("a", fleet.prompt_read("a", new))
    assert (fleet.states["a"].requests, fleet.states["a"].prompt_tokens) == (0, 0)


def test_the_hello_of_a_process_that_left_is_not_taken_for_the_next_of_its_name() -> None:
    fleet = ready(make("a"))
    hello = {"tp_rank": 0, "tp_size": 1, "endpoint": {"at": "old"}}
    fleet.greet("a", hello)
    fleet.remove("a")
    assert not fleet.greet("a", hello)
    fleet.add(replace(make("a"), url="http://127.0.0.1:9999"))
    assert not fleet.greet("a", hello)
    assert fleet.states["a"].hello is None
    assert fleet.greet("a", {**hello, "endpoint": {"at": "new"}})


def test_the_same_server_may_come_back_under_its_name_and_say_hello() -> None:
    fleet = ready(make("a"))
    hello = {"tp_rank": 0, "tp_size": 1, "endpoint": {"at": "old"}}
    fleet.greet("a", hello)
    fleet.remove("a")
    fleet.add(make("a"))
    assert fleet.greet("a", hello)


def test_a_name_is_borne_once() -> None:
    fleet = ready(make("a"))
    with pytest.raises(ValueError, match="already"):
        fleet.add(make("a"))


def test_a_view_that_somebody_holds_is_replaced_when_the_fleet_changes() -> None:
    fleet = ready(make("a"))
    before = fleet.view()
    assert fleet.view() is before
    fleet.add(make("b"))
    assert [w.name for w in before.workers] == ["a"]
    assert [w.name for w in fleet.view().workers] == ["a", "b"]


def test_a_worker_that_comes_back_is_on_trial_until_a_request_succeeds() -> None:
    fleet = ready(make("a"), make("b"))
    assert not fleet.view().loads["a"].trial  # a start is no return
    fleet.failed("a", "refused", "nobody listens")
    fleet.probe_ok("a", ("m",))
    assert fleet.view().loads["a"].trial
    work = fleet.begin("a", Work(1))
    assert not fleet.states["a"].has_room
    fleet.succeeded("a")
    fleet.end("a", work)
    assert not fleet.view().loads["a"].trial


def test_nobody_is_tried_while_there_is_nobody_else() -> None:
    fleet = ready(make("a"), make("b"))
    fleet.failed("a", "refused", "nobody listens")
    fleet.probe_ok("a", ("m",))
    assert fleet.view().loads["a"].trial
    fleet.failed("b", "refused", "nobody listens")
    assert not fleet.view().loads["a"].trial


def test_the_least_bad_is_kept_until_a_sound_one_is_there() -> None:
    fleet = ready(make("a", Role.DECODE), make("b", Role.DECODE))
    for name, times in (("a", 5), ("b", 3)):
        for _ in range(times):
            fleet.failed(name, "http_500", "of a test")
    assert [w.name for w in fleet.view().serving(Role.DECODE)] == ["b"]
    assert not fleet.states["b"].healthy
    fleet.probe_ok("a", ("m",))
    assert [w.name for w in fleet.view().serving(Role.DECODE)] == ["a"]


@pytest.mark.parametrize("kind", ["refused", "unreachable"])
def test_a_worker_that_cannot_be_reached_is_not_kept(kind: str) -> None:
    fleet = ready(make("a"))
    fleet.failed("a", kind, "of a test")
    assert not fleet.view().serving(Role.DECODE)


def test_a_prefill_worker_is_kept_only_where_requests_fail_without_it() -> None:
    whole = ready(make("a", Role.PREFILL), make("b", Role.DECODE))
    dependent = ready(make("a", Role.PREFILL, "sglang"), make("b", Role.DECODE, "sglang"))
    for fleet in (whole, dependent):
        for _ in range(3):
            fleet.failed("a", "timeout", "of a test")
    assert not whole.view().serving(Role.PREFILL)
    assert dependent.view().serving(Role.PREFILL)


def test_an_engine_with_one_role_at_a_time_begins_as_decode_where_it_can_switch() -> None:
    fixed = make("a", Role.BOTH, "sglang")
    fleet = ready(fixed, replace(make("b", Role.BOTH, "sglang"), role_switch=True))
    a, b = fleet.workers
    assert (a.role, a.whole, a.handoffs, a.movable) == (Role.BOTH, True, False, False)
    assert (b.role, b.whole, b.handoffs, b.movable) == (Role.DECODE, False, True, True)
    fleet.set_role("b", Role.PREFILL)
    assert (fleet.workers[1].role, fleet.workers[1].whole) == (Role.PREFILL, False)
    assert fleet.states["b"].declared.role is Role.BOTH


def come_and_go(count: int) -> None:
    """Let workers join, fall ill, recover and leave, with a look at the fleet after each step."""
    fleet = empty()
    names = [f"w{i}" for i in range(count)]
    for i, name in enumerate(names):
        fleet.add(Worker(name, f"http://10.0.0.1:{i}", "vllm", Role.BOTH))
        fleet.probe_ok(name, ("m",))
        fleet.view()
    for name in names:
        fleet.failed(name, "refused", "of a test")
        fleet.view()
        fleet.probe_ok(name, ("m",))
        fleet.view()
    for name in names:
        fleet.remove(name)
        fleet.view()


def lines_run(count: int) -> int:
    lines = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        come_and_go(count)
    finally:
        sys.settrace(before)
    return lines


def test_what_a_worker_costs_that_joins_falls_ill_or_leaves_does_not_grow_with_the_fleet() -> None:
    assert lines_run(1000) < 11 * lines_run(100)
