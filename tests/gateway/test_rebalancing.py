"""Roles move under load: the old one drains first, no request is lost, servers are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.placement.types import RoleChange
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_plugins.types import Role
from tests.gateway.harness import LONG, SHORT, Stack, VllmPlugin, eventually
from tests.gateway.test_admin import ask, message
from tests.gateway.test_membership import SLOW, Client
from tests.gateway.test_rendezvous import DependentDialect, RoomPlugin, introduce

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body

Build = Callable[..., Stack]


class SwitchingDialect(DependentDialect):
    """Its servers have one role at a time and are told which."""

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        return "/pd_role_switch", {"new_role": role.value}


def role_of(stack: Stack, name: str) -> str:
    return str(stack.gateway.fleet.states[name].worker.role)


def wait_role(stack: Stack, name: str, role: str) -> None:
    eventually(lambda: role_of(stack, name) == role, f"{name} becomes {role}")


def test_a_role_moves_under_load_and_no_request_is_lost(build: Build) -> None:
    stack = build(a="both", b="both", c="both", behaviours={n: SLOW for n in "abc"})
    statuses: list[int] = []
    stopping = threading.Event()

    def load() -> None:
        while not stopping.is_set():
            status, body = stack.complete(LONG, stream=True, max_tokens=5)
            statuses.append(status if body.endswith(b"data: [DONE]\n\n") else 0)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for role in ("prefill", "decode", "both", "decode", "prefill"):
            assert ask(stack, "POST", "a", {"role": role})[0] == 202
            wait_role(stack, "a", role)
            eventually(lambda: stack.gateway.rebalancer.moving() is None, "the change is over")
            done = len(statuses)
            eventually(lambda done=done: len(statuses) > done + 4, "requests go on")
    finally:
        stopping.set()
        for thread in threads:
            thread.join(15)
    assert set(statuses) == {200}
    assert stack.metric("disagg_failures") == 0
    stack.wait_idle()
    assert stack.status()["role_changes"] == 5


def test_the_old_role_drains_before_the_new_one_begins(build: Build) -> None:
    stack = build(p="prefill", a="both", d="decode", behaviours={"a": SLOW, "d": SLOW})
    assert ask(stack, "POST", "a", {"role": "decode"})[0] == 202
    assert role_of(stack, "a") == "decode"  # it gave up a role: nothing to wait for
    clients = [Client(stack), Client(stack)]
    state = stack.gateway.fleet.states["a"]
    eventually(lambda: state.requests == 1, "it writes an answer")
    status, answer = ask(stack, "POST", "a", {"role": "prefill"})
    assert (status, answer["role"], answer["draining"]) == (202, "decode", True)
    assert stack.status()["role_change"] == {
        "worker": "a",
        "role": "prefill",
        "reason": "asked for by an operator",
    }
    status, answer = ask(stack, "POST", "a", {"role": "both"})
    assert (status, "one at a time" in message(answer)) == (409, True)
    assert [client.end()[0] for client in clients] == [200, 200]
    wait_role(stack, "a", "prefill")
    assert not state.draining
    assert state.declared.role is Role.BOTH


def test_requests_that_do_not_end_keep_a_worker_in_its_role(build: Build) -> None:
    stack = build(
        a="both",
        b="both",
        gateway={"drain_s": 0.2},
        behaviours={"a": Behaviour(hang="stream"), "b": Behaviour(hang="stream")},
    )
    assert ask(stack, "POST", "a", {"role": "decode"})[0] == 202
    clients = [Client(stack), Client(stack)]
    state = stack.gateway.fleet.states["a"]
    eventually(lambda: state.requests == 1, "a request hangs")
    assert ask(stack, "POST", "a", {"role": "prefill"})[0] == 202
    eventually(lambda: stack.gateway.rebalancer.moving() is None, "it is given up")
    assert (role_of(stack, "a"), state.draining, state.requests) == ("decode", False, 1)
    for name in "ab":
        assert ask(stack, "DELETE", name)[0] == 202
    assert len([client.end() for client in clients]) == 2


def test_the_last_worker_of_a_role_keeps_it(build: Build) -> None:
    stack = build(a="both", p="prefill")
    status, answer = ask(stack, "POST", "a", {"role": "prefill"})
    assert (status, "last healthy decode worker" in message(answer)) == (409, True)
    assert ask(stack, "POST", "a", {"role": "decode"})[0] == 202


def switching(build: Build, **more: object) -> Stack:
    stack = build(
        a="both",
        b="both",
        c="both",
        dialects=RoomPlugin(SwitchingDialect()),
        worker={"role_switch": True},
        **more,
    )
    for name in "abc":
        introduce(stack, name)
    return stack


def test_servers_with_one_role_at_a_time_are_told_to_switch_when_they_are_idle(
    build: Build,
) -> None:
    stack = switching(build)
    engines = stack.engines
    assert {n: engines[n].switches for n in "abc"} == {n: ["decode"] for n in "abc"}
    assert ask(stack, "POST", "a", {"role": "prefill"})[0] == 202
    wait_role(stack, "a", "prefill")
    assert engines["a"].switches == ["decode", "prefill"]
    assert stack.gateway.fleet.states["a"].hello is None  # of its old role
    introduce(stack, "a")
    status, body = stack.complete(LONG, stream=True)
    assert (status, body.endswith(b"data: [DONE]\n\n")) == (200, True)
    assert engines["a"].seen.prefills == 1
    status, answer = ask(stack, "POST", "a", {"role": "both"})
    assert (status, "one role at a time" in message(answer)) == (409, True)


def test_a_server_that_refuses_to_switch_keeps_its_role_or_rests(build: Build) -> None:
    stack = switching(build)
    state = stack.gateway.fleet.states["a"]
    stack.engines["a"].switch_status = 400
    assert ask(stack, "POST", "a", {"role": "prefill"})[0] == 202
    eventually(lambda: "role of its server is not known" in state.reason, "it rests")
    eventually(lambda: stack.gateway.rebalancer.moving() is None, "the change is over")
    assert (role_of(stack, "a"), state.draining) == ("decode", False)
    stack.engines["a"].switch_status = 200
    eventually(lambda: state.healthy, "it is found in its role again")
    assert stack.engines["a"].switches == ["decode", "decode"]


def test_a_server_that_does_not_answer_rests(build: Build) -> None:
    stack = switching(build, scheduler={"rebalance": {"switch_s": 0.1}})
    state = stack.gateway.fleet.states["a"]
    stack.engines["a"].switch_status = None
    assert ask(stack, "POST", "a", {"role": "prefill"})[0] == 202
    eventually(lambda: "no answer to POST /pd_role_switch" in state.reason, "it rests")
    stack.engines["a"].switch_status = 200
    eventually(lambda: state.healthy, "it is found in its role again")
    assert role_of(stack, "a") == "decode"


class Proposes(VllmPlugin):
    """Moves a worker when it is asked the first time, then always another."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, set[Role]]] = []

    @hookimpl
    def disagg_select_rebalance(self, fleet: object, loads: dict[Role, object]) -> RoleChange:
        self.asked.append((len(self.asked), set(loads)))
        return RoleChange("a" if len(self.asked) == 1 else "b", Role.DECODE, "of a test")


def test_plugins_propose_and_two_changes_are_held_apart(build: Build) -> None:
    plugin = Proposes()
    rules = {"enabled": True, "every_s": 0.05, "hold_s": 60.0}
    stack = build(a="both", b="both", c="both", dialects=plugin, scheduler={"rebalance": rules})
    wait_role(stack, "a", "decode")
    assert plugin.asked == [(0, {Role.PREFILL, Role.DECODE})]
    assert stack.complete(SHORT)[0] == 200
    assert role_of(stack, "b") == "both"


def test_nobody_is_asked_where_the_policy_does_not_say_so(build: Build) -> None:
    plugin = Proposes()
    stack = build(a="both", b="both", c="both", dialects=plugin)
    assert [stack.complete(SHORT)[0] for _ in range(3)] == [200] * 3
    assert not plugin.asked


def test_the_built_in_rule_moves_a_worker_to_prompts_that_wait(build: Build) -> None:
    reads = Behaviour(first_s=0.3)
    rules = {"enabled": True, "every_s": 0.2, "hold_s": 60.0, "high": 0.2, "low": 0.1}
    stack = build(
        p="prefill",
        a="both",
        b="both",
        behaviours={"p": reads},
        scheduler={"rebalance": rules},
    )
    assert ask(stack, "POST", "a", {"role": "decode"})[0] == 202
    assert role_of(stack, "a") == "decode"
    stack.call(lambda: setattr(stack.gateway.rebalancer, "_held_until_s", 0.0))
    stopping = threading.Event()

    def load() -> None:
        while not stopping.is_set():
            stack.complete(LONG)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_role(stack, "a", "prefill")
    finally:
        stopping.set()
        for thread in threads:
            thread.join(15)
    stack.wait_idle()


@pytest.mark.parametrize("answer", ["nonsense", RoleChange("nobody", Role.DECODE, "")])
def test_nonsense_of_a_plugin_moves_nobody(build: Build, answer: object) -> None:
    class Wrong(VllmPlugin):
        @hookimpl
        def disagg_select_rebalance(self) -> object:
            return answer

    rules = {"enabled": True, "every_s": 0.05}
    stack = build(a="both", b="both", dialects=Wrong(), scheduler={"rebalance": rules})
    eventually(lambda: stack.gateway.plugin_failures().get("fake_vllm"), "it is counted")
    assert stack.gateway.rebalancer.changes == 0
