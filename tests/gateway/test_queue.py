"""Requests wait at the gateway for a prefill worker, and are admitted or refused at once."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, VllmPlugin, eventually
from tests.gateway.test_faults import free_port, kill, worker_process

if TYPE_CHECKING:
    from socket import socket

    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.worker_state import Work
    from disagg_plugins.types import RequestProfile, Worker

Build = Callable[..., Stack]
HANG = Behaviour(hang="head")


def request(prompt: str, *, tenant: str | None = None, close: bool = False) -> bytes:
    body = json.dumps({"model": "fake-model", "prompt": prompt, "max_tokens": 4}).encode()
    more = b"" if tenant is None else b"x-disagg-tenant: %b\r\n" % tenant.encode()
    more += b"Connection: close\r\n" if close else b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n"
    return head % (more, len(body)) + body


def queueing(slots: int = 1, **queue: object) -> dict[str, object]:
    return {"queue": {"prefills_per_worker": slots, "max_wait_s": 60.0, **queue}}


def prompt(name: str, words: int = 300) -> str:
    return f"{name} " + "word " * words


def waiting(stack: Stack, count: int) -> None:
    eventually(lambda: len(stack.gateway.entrance) == count, f"{count} wait")


def answer(sock: socket) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPResponse(sock)) as response:
        response.begin()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def occupy(stack: Stack) -> socket:
    """Take the only slot for as long as the returned client stays."""
    stack.engines["p0"].behaviour = HANG
    seen = stack.engines["p0"].seen.requests
    sock = stack.raw(request(LONG))
    eventually(lambda: stack.engines["p0"].seen.requests == seen + 1, "the slot is taken")
    stack.engines["p0"].behaviour = Behaviour()
    return sock


def queue_up(stack: Stack, *requests: bytes) -> list[socket]:
    """Send requests that wait, in this order."""
    before, socks = len(stack.gateway.entrance), []
    for number, data in enumerate(requests, 1):
        socks.append(stack.raw(data))
        waiting(stack, before + number)
    return socks


def names_read(stack: Stack) -> list[str]:
    """Return the first words of the prompts that the prefill worker saw, in order."""
    return [str(body["prompt"]).split()[0] for body in stack.engines["p0"].seen.bodies][1:]


def test_a_request_that_finds_a_slot_does_not_wait(build: Build) -> None:
    stack = build(scheduler=queueing())
    assert stack.complete()[0] == 200
    (record,) = stack.records(1)
    assert record["queue_s"] == 0.0
    assert record["split"] != "no"


def test_no_more_prompts_than_slots_are_read_at_once(build: Build) -> None:
    stack = build(
        scheduler=queueing(2),
        behaviours={"p0": Behaviour(first_s=0.02)},
    )
    most, prefills = [0], stack.gateway.fleet.states["p0"]
    give = stack.gateway.members.give

    def counting(worker: Worker, work: Work) -> tuple[WorkerPool, Work]:
        given = give(worker, work)
        most[0] = max(most[0], prefills.prefills)
        return given

    stack.gateway.members.give = counting  # type: ignore[method-assign]
    statuses: list[int] = []
    clients = [
        threading.Thread(target=lambda: statuses.append(stack.complete()[0])) for _ in range(20)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(10)
    assert statuses == [200] * 20
    assert most == [2]
    assert stack.engines["p0"].seen.prefills == 20
    assert stack.engines["d0"].seen.locals == 0
    records = stack.records(20)
    assert sum(float(str(r["queue_s"])) > 0 for r in records) >= 10
    stack.wait_idle()


def test_a_waiting_request_uses_no_connection_and_is_shown(build: Build) -> None:
    stack = build(scheduler=queueing())
    first = occupy(stack)
    (second,) = queue_up(stack, request(LONG))
    assert stack.status()["waiting"] == 1
    assert b"disagg_requests_waiting 1.0" in stack.request("GET", "/metrics")[2]
    states = stack.gateway.fleet.states
    assert [states[name].requests for name in ("p0", "d0")] == [1, 1], "the first one's alone"
    assert stack.engines["p0"].seen.requests == 1
    assert stack.engines["d0"].seen.requests == 0
    first.close()
    assert answer(second)[0] == 200
    assert b'disagg_queue_seconds_count{end="split"} 1.0' in stack.request("GET", "/metrics")[2]


def test_a_client_that_leaves_frees_its_place(build: Build) -> None:
    stack = build(scheduler=queueing())
    first = occupy(stack)
    leaves, stays = queue_up(stack, request(prompt("a")), request(prompt("b")))
    leaves.close()
    waiting(stack, 1)
    first.close()
    assert answer(stays)[0] == 200
    assert names_read(stack) == ["b"]
    stack.wait_idle()


@pytest.mark.parametrize(
    ("order", "expected"), [("fifo", ["a", "b", "c"]), ("shortest", ["b", "c", "a"])]
)
def test_the_engine_sees_prompts_in_the_policys_order(
    build: Build, order: str, expected: list[str]
) -> None:
    stack = build(scheduler=queueing(order=order, ageing_s=50.0))
    first = occupy(stack)
    sent = [request(prompt(name, words)) for name, words in (("a", 900), ("b", 100), ("c", 300))]
    socks = queue_up(stack, *sent)
    first.close()
    assert [answer(sock)[0] for sock in socks] == [200] * 3
    assert names_read(stack) == expected


def test_tenants_take_turns_and_a_higher_priority_goes_first(build: Build) -> None:
    tenants = {"*": {}, "vip": {"priority": 5}}
    stack = build(scheduler={**queueing(), "tenants": tenants})
    first = occupy(stack)
    sent = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("v1", "vip")]
    socks = queue_up(stack, *[request(prompt(name), tenant=tenant) for name, tenant in sent])
    first.close()
    assert [answer(sock)[0] for sock in socks] == [200] * 5
    order = names_read(stack)
    assert order[0] == "v1"
    assert order.index("b1") < order.index("a3")


def test_plugins_say_who_is_urgent(build: Build) -> None:
    class Urgent(VllmPlugin):
        @hookimpl
        def disagg_score_queue(self, profile: RequestProfile) -> float:
            return 1.0 if profile.tenant == "urgent" else 0.0

    stack = build(scheduler=queueing(ageing_s=50.0), dialects=Urgent())
    first = occupy(stack)
    sent = [request(prompt("a")), request(prompt("b"), tenant="urgent")]
    socks = queue_up(stack, *sent)
    first.close()
    assert [answer(sock)[0] for sock in socks] == [200, 200]
    assert names_read(stack) == ["b", "a"]


def test_who_waits_too_long_is_answered_by_a_decode_worker(build: Build) -> None:
    stack = build(scheduler=queueing(max_wait_s=0.1))
    occupy(stack)
    assert stack.complete()[0] == 200
    assert stack.engines["d0"].seen.locals == 1
    record = stack.records(1)[0]
    assert record["route"] == "local"
    assert float(str(record["queue_s"])) >= 0.1


def test_who_waits_too_long_is_refused_where_no_worker_serves_whole_requests(build: Build) -> None:
    stack = build(scheduler=queueing(max_wait_s=0.1))
    occupy(stack)
    state = stack.gateway.fleet

    def only_handed() -> None:
        for name, worker in list(state._names.items()):
            state._names[name] = state.states[name].worker = replace(worker, whole=False)
        state.workers = tuple(state._names.values())
        state._unsorted = True

    stack.call(only_handed)
    status, headers, body = answer(stack.raw(request(LONG)))
    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert b"prefill-slots" in body


def test_more_than_may_wait_are_refused_at_once(build: Build) -> None:
    stack = build(scheduler=queueing(max_waiting=1, max_wait_s=30.0))
    first = occupy(stack)
    (second,) = queue_up(stack, request(LONG))
    status, headers, body = answer(stack.raw(request(LONG)))
    assert status == 503
    assert headers["retry-after"] == "30"
    assert b"max_waiting" in body
    assert stack.complete(SHORT)[0] == 200, "what needs no prefill worker is served"
    first.close()
    assert answer(second)[0] == 200


def test_nobody_waits_where_the_policy_says_so(build: Build) -> None:
    stack = build(scheduler=queueing(max_waiting=0))
    occupy(stack)
    assert stack.complete()[0] == 200
    assert stack.engines["d0"].seen.locals == 1


def test_shutdown_refuses_who_waits_and_lets_the_others_end(build: Build) -> None:
    stack = build(scheduler=queueing(), behaviours={"d0": Behaviour(first_s=0.3)})
    short = stack.raw(request(SHORT))
    eventually(lambda: stack.engines["d0"].seen.requests == 1, "a request runs")
    occupy(stack)
    (second,) = queue_up(stack, request(LONG))
    stack.request_stop()
    status, headers, body = answer(second)
    assert status == 503
    assert headers["retry-after"] == "5"
    assert b"shutting down" in body
    assert answer(short)[0] == 200


def test_who_waits_for_a_prefill_worker_that_dies_is_answered_by_a_decode_worker(
    build: Build,
) -> None:
    port = free_port()
    with worker_process(port, "--first-s", "30") as process:
        stack = build(absent=("p0",), port_of={"p0": port}, scheduler=queueing())
        stack.wait_healthy()
        first = stack.raw(request(LONG))
        eventually(lambda: stack.gateway.pools["p0"].counts()["busy"] == 1, "prefill works")
        socks = [first, *queue_up(stack, *[request(LONG)] * 3)]
        kill(process)
        assert [answer(sock)[0] for sock in socks] == [200] * 4
    stack.wait_idle()


def test_who_waits_goes_to_a_prefill_worker_that_comes_back(build: Build) -> None:
    stack = build(p0="prefill", p1="prefill", d0="decode", scheduler=queueing())
    stack.engines["p1"].healthy = False
    states = stack.gateway.fleet.states
    eventually(lambda: not states["p1"].healthy, "p1 rests")
    occupy(stack)
    (second,) = queue_up(stack, request(LONG))
    stack.engines["p1"].healthy = True
    assert answer(second)[0] == 200
    assert stack.engines["p1"].seen.prefills == 1


def test_a_tenant_over_its_limit_is_refused_with_a_computed_retry_after(build: Build) -> None:
    rules = {"*": {"prompt_tokens_per_s": 10, "burst_tokens": 400}}
    stack = build(scheduler={"tenants": rules})
    assert answer(stack.raw(request(LONG, tenant="a")))[0] == 200
    status, headers, body = answer(stack.raw(request(LONG, tenant="a")))
    assert status == 429
    assert 30 <= int(headers["retry-after"]) <= 36  # 375 tokens of 400 taken, 10 a second
    assert b"scheduler.tenants" in body
    assert answer(stack.raw(request(LONG, tenant="b")))[0] == 200, "each stranger has its own"
    assert stack.complete(user="c")[0] == 200


def test_requests_that_end_in_any_way_leave_their_tenants_account(build: Build) -> None:
    stack = build(scheduler={**queueing(), "tenants": {"*": {"max_requests": 2}}})
    first = occupy(stack)
    (second,) = queue_up(stack, request(LONG))
    status, headers, _ = answer(stack.raw(request(LONG)))
    assert (status, headers["retry-after"]) == (429, "1")
    with ExitStack() as leaving:
        leaving.callback(first.close)
        leaving.callback(second.close)
    stack.wait_idle()
    assert stack.complete()[0] == 200
    accounts = stack.gateway.entrance._tenants._accounts
    eventually(lambda: all(a.requests == 0 for a in accounts.values()), "nothing is held")
