"""Workers join, drain and leave under traffic: no request is lost, nothing of them is left."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import yaml

from disagg_plugins.gateway.admin import PATH
from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine
from tests.gateway.harness import LONG, SECRET, SHORT, Stack, eventually
from tests.gateway.test_admin import ask
from tests.gateway.test_relay import text_of

Build = Callable[..., Stack]
SLOW = Behaviour(chunk_s=0.02)


def gone(stack: Stack, name: str) -> bool:
    return name not in stack.gateway.fleet.states


def wait_gone(stack: Stack, name: str) -> None:
    eventually(lambda: gone(stack, name), f"{name} has left")


def nothing_left_of(stack: Stack, name: str) -> None:
    gateway = stack.gateway
    assert name not in gateway.pools
    assert name not in gateway.members
    assert name not in gateway.prober._tasks
    assert name not in gateway.fleet._loads
    assert not any(name in labels for labels in gateway.metrics._counts["disagg_failures"])
    assert name not in gateway.fleet._lists._listed


class Client:
    """One request on a thread of its own."""

    def __init__(self, stack: Stack, prompt: str = SHORT, tokens: int = 20) -> None:
        self.answer: tuple[int, bytes] | None = None

        def run() -> None:
            try:
                self.answer = stack.complete(prompt, stream=True, max_tokens=tokens)
            except http.client.IncompleteRead as broken:
                self.answer = 200, broken.partial

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def end(self) -> tuple[int, bytes]:
        self._thread.join(15)
        assert self.answer is not None
        return self.answer


def test_a_worker_joins_while_others_serve(build: Build) -> None:
    stack = build(d0="decode", behaviours={"d0": SLOW})
    with FakeEngine(secret=SECRET) as engine:
        client = Client(stack)
        new = {"name": "d1", "url": engine.url, "role": "decode", "labels": {"zone": "a"}}
        status, answer = ask(stack, "POST", body=new)
        assert (status, answer["by"], answer["labels"]) == (201, "operator", {"zone": "a"})
        stack.wait_healthy("d1")
        assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
        assert engine.seen.requests >= 1
        assert client.end()[0] == 200
        assert ask(stack, "DELETE", "d1")[0] == 202
        wait_gone(stack, "d1")


def test_a_worker_that_leaves_ends_its_stream_and_takes_nothing_new(build: Build) -> None:
    stack = build(d0="decode", d1="decode", behaviours={"d0": SLOW, "d1": SLOW})
    clients = [Client(stack), Client(stack)]
    states = stack.gateway.fleet.states
    eventually(lambda: all(states[n].requests for n in ("d0", "d1")), "both work")
    status, answer = ask(stack, "DELETE", "d0")
    assert (status, answer["leaving"], answer["draining"]) == (202, True, True)
    before = stack.engines["d0"].seen.requests
    assert [stack.complete(SHORT)[0] for _ in range(3)] == [200] * 3
    assert stack.engines["d0"].seen.requests == before
    for client in clients:
        code, body = client.end()
        assert code == 200
        assert body.endswith(b"data: [DONE]\n\n")
    wait_gone(stack, "d0")
    nothing_left_of(stack, "d0")
    assert ask(stack, "GET", "d0")[0] == 404
    eventually(lambda: not stack.engines["d0"].connections, "its connections are closed")


def test_what_does_not_end_in_time_is_retried_elsewhere(build: Build) -> None:
    stack = build(
        gateway={"drain_s": 0.3},
        d0="decode",
        d1="decode",
        behaviours={"d0": Behaviour(hang="head")},
    )
    clients = [Client(stack), Client(stack)]
    state = stack.gateway.fleet.states["d0"]
    eventually(lambda: state.requests == 1, "one request hangs")
    assert ask(stack, "DELETE", "d0")[0] == 202
    assert [client.end()[0] for client in clients] == [200, 200]
    wait_gone(stack, "d0")
    stack.wait_idle()
    nothing_left_of(stack, "d0")
    records = stack.records(2)
    assert [f["kind"] for r in records for f in r["failures"]] == ["drained"]  # type: ignore[attr-defined]


def test_a_stream_that_does_not_end_in_time_breaks_off_visibly(build: Build) -> None:
    hangs = Behaviour(hang="stream", after_chunks=2)
    brief = {"drain_s": 0.3, "resume": False}
    stack = build(gateway=brief, d0="decode", d1="decode", behaviours={"d0": hangs})
    clients = [Client(stack), Client(stack)]
    eventually(lambda: stack.gateway.fleet.states["d0"].requests == 1, "one stream hangs")
    assert ask(stack, "DELETE", "d0")[0] == 202
    bodies = [client.end()[1] for client in clients]
    assert sum(b"upstream_broke_off" in body for body in bodies) == 1
    stack.wait_idle()


def test_a_stream_that_does_not_end_in_time_goes_on_at_another_worker(build: Build) -> None:
    hangs = Behaviour(hang="stream", after_chunks=2)
    stack = build(gateway={"drain_s": 0.3}, d0="decode", d1="decode", behaviours={"d0": hangs})
    clients = [Client(stack), Client(stack)]
    eventually(lambda: stack.gateway.fleet.states["d0"].requests == 1, "one stream hangs")
    assert ask(stack, "DELETE", "d0")[0] == 202
    first, second = (client.end()[1] for client in clients)
    assert first.endswith(b"data: [DONE]\n\n")
    assert text_of(first) == text_of(second)
    stack.wait_idle()


def test_a_route_that_is_older_than_the_fleet_goes_on_with_another_worker(build: Build) -> None:
    slow = {"p0": Behaviour(first_s=0.6)}
    brief = {"drain_s": 0.1}
    stack = build(gateway=brief, p0="prefill", d0="decode", d1="decode", behaviours=slow)
    clients = [Client(stack, LONG), Client(stack, LONG)]  # each will decode on another worker
    eventually(lambda: stack.gateway.fleet.states["p0"].requests == 2, "both prompts are read")
    assert ask(stack, "DELETE", "d0")[0] == 202
    wait_gone(stack, "d0")
    assert [client.end()[0] for client in clients] == [200, 200]
    stack.wait_idle()
    assert stack.engines["d1"].seen.completed == 2


def test_a_name_may_be_used_again_and_starts_from_nothing(build: Build) -> None:
    stack = build(d0="decode", d1="decode")
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert ask(stack, "DELETE", "d0")[0] == 202
    wait_gone(stack, "d0")
    with FakeEngine(secret=SECRET) as engine:
        new = {"name": "d0", "url": engine.url, "role": "decode"}
        assert ask(stack, "POST", body=new)[0] == 201
        stack.wait_healthy("d0")
        state = stack.gateway.fleet.states["d0"]
        assert (state.served, state.requests, state.failed) == (0, 0, {})
        assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
        assert engine.seen.requests == 2
        stack.wait_idle()
        assert ask(stack, "DELETE", "d0")[0] == 202
        wait_gone(stack, "d0")


def test_a_late_request_of_a_worker_that_left_does_not_hurt_the_next_of_its_name(
    build: Build,
) -> None:
    stack = build(d0="decode", d1="decode", behaviours={"d0": SLOW}, gateway={"drain_s": 0.1})
    clients = [Client(stack, tokens=40), Client(stack, tokens=40)]
    eventually(lambda: stack.gateway.fleet.states["d0"].requests == 1, "it streams")
    assert ask(stack, "DELETE", "d0")[0] == 202
    wait_gone(stack, "d0")
    with FakeEngine(secret=SECRET) as engine:
        assert (
            ask(stack, "POST", body={"name": "d0", "url": engine.url, "role": "decode"})[0] == 201
        )
        for client in clients:
            client.end()
        stack.wait_healthy("d0")
        stack.wait_idle()
        assert stack.gateway.fleet.states["d0"].failures == 0
        assert ask(stack, "DELETE", "d0")[0] == 202
        wait_gone(stack, "d0")


def test_a_name_is_not_free_before_its_worker_has_left(build: Build) -> None:
    stack = build(d0="decode", d1="decode", behaviours={"d0": SLOW})
    clients = [Client(stack), Client(stack)]
    eventually(lambda: stack.gateway.fleet.states["d0"].requests == 1, "it streams")
    assert ask(stack, "DELETE", "d0")[0] == 202
    new = {"name": "d0", "url": "http://127.0.0.1:9", "role": "decode"}
    status, answer = ask(stack, "POST", body=new)
    assert (status, "still leaving" in answer["error"]["message"]) == (409, True)
    assert ask(stack, "POST", "d0", {"drain": False})[0] == 409
    assert {client.end()[0] for client in clients} == {200}


def test_a_drained_worker_stays_and_may_take_requests_again(build: Build) -> None:
    stack = build(d0="decode", d1="decode")
    assert ask(stack, "POST", "d0", {"drain": True})[0] == 202
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert stack.engines["d0"].seen.requests == 0
    assert ask(stack, "POST", "d0", {"drain": False})[0] == 202
    assert [stack.complete(SHORT)[0] for _ in range(4)] == [200] * 4
    assert stack.engines["d0"].seen.requests > 0


def test_workers_that_come_and_go_leave_no_task_behind(build: Build) -> None:
    stack = build(d0="decode")
    with FakeEngine(secret=SECRET) as engine:
        for i in range(20):
            new = {"name": f"x{i}", "url": engine.url, "role": "decode"}
            assert ask(stack, "POST", body=new)[0] == 201
            assert ask(stack, "DELETE", f"x{i}")[0] == 202
            wait_gone(stack, f"x{i}")
    gateway = stack.gateway
    assert list(gateway.pools) == ["d0"]
    eventually(lambda: len(gateway.running()) == 4, f"{gateway.running()}")


# The watched file ------------------------------------------------------------------------------


def replace_file(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def workers_text(**urls: str) -> str:
    return yaml.safe_dump([{"name": n, "url": u, "role": "decode"} for n, u in urls.items()])


def names(stack: Stack) -> set[str]:
    return set(stack.gateway.fleet.states)


def test_the_fleet_follows_a_file_and_keeps_what_it_was_while_the_file_is_wrong(
    build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "workers.yaml"
    with ExitStack() as engines:
        a, b = (engines.enter_context(FakeEngine(secret=SECRET)) for _ in "ab")
        stack = build(d0="decode", fleet={"watch": str(path), "watch_s": 0.05})
        eventually(
            lambda: (
                "there is no such" in stack.gateway.members.file_problem
                or "cannot look" in stack.gateway.members.file_problem
            ),
            "its absence is told",
        )
        replace_file(path, workers_text(a=a.url))
        stack.wait_healthy("d0")
        eventually(lambda: names(stack) == {"d0", "a"}, "a joined")
        stack.wait_healthy("a")

        replace_file(path, workers_text(a=a.url) + "- {name: b, url: nonsense, role: decode}\n")
        eventually(lambda: stack.gateway.members.file_problem, "the problem is told")
        problem = str(stack.status()["fleet_file"])
        assert f"{path}:4: [1].url: 'nonsense' is not of the form" in problem
        assert names(stack) == {"d0", "a"}

        replace_file(path, workers_text(a=a.url, b=b.url))
        eventually(lambda: names(stack) == {"d0", "a", "b"}, "b joined")
        assert stack.status()["fleet_file"] == ""

        replace_file(path, workers_text(b=b.url))
        eventually(lambda: names(stack) == {"d0", "b"}, "a left")
        nothing_left_of(stack, "a")

        before = stack.gateway.fleet.states["b"]
        replace_file(path, workers_text(b=a.url))
        eventually(lambda: stack.gateway.fleet.states.get("b") not in (None, before), "b moved")
        assert stack.gateway.fleet.states["b"].worker.url == a.url

        known = stack.gateway.fleet.states["b"]
        path.write_text(f"- {{name: b, url: '{a.url}', role: decode, capacity: 7}}\n")
        eventually(lambda: known.worker.capacity == 7, "b has another capacity")
        assert stack.gateway.fleet.states["b"] is known

        replace_file(path, "[]\n")
        eventually(lambda: names(stack) == {"d0"}, "all left")


def test_a_file_cannot_take_a_name_or_an_address_of_the_policy(
    build: Build, tmp_path: Path
) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(workers_text(d0="http://127.0.0.1:9"))
    stack = build(d0="decode", fleet={"watch": str(path), "watch_s": 0.05})
    members = stack.gateway.members
    eventually(lambda: "worker d0 is in the fleet already" in members.file_problem, "told")
    path.write_text(workers_text(x=stack.engines["d0"].url))
    eventually(lambda: "worker x is in the fleet already" in members.file_problem, "told")
    assert names(stack) == {"d0"}


def test_workers_may_exchange_their_addresses_in_the_file(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    with FakeEngine(secret=SECRET) as a, FakeEngine(secret=SECRET) as b:
        path.write_text(workers_text(a=a.url, b=b.url))
        stack = build(d0="decode", fleet={"watch": str(path), "watch_s": 0.05})
        eventually(lambda: names(stack) == {"d0", "a", "b"}, "both joined")
        replace_file(path, workers_text(a=b.url, b=a.url))

        def exchanged() -> bool:
            states = stack.gateway.fleet.states
            urls = [states[n].worker.url if n in states else "" for n in "ab"]
            return urls == [b.url, a.url]

        eventually(exchanged, "they exchanged their addresses")
        replace_file(path, "[]\n")
        eventually(lambda: names(stack) == {"d0"}, "all left")


def test_a_fleet_may_consist_of_the_file_alone(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    with FakeEngine(secret=SECRET) as engine:
        path.write_text(workers_text(w=engine.url))
        stack = build(
            p0="prefill", fleet={"watch": str(path), "watch_s": 0.05, "workers": []}, wait=False
        )
        eventually(lambda: names(stack) == {"w"}, "it joined")
        stack.wait_healthy("w")
        assert stack.complete(SHORT)[0] == 200
        assert stack.request("GET", PATH)[0] == 200
        path.unlink()
        eventually(lambda: stack.gateway.members.file_problem, "its absence is told")
        assert stack.complete(SHORT)[0] == 200
        replace_file(path, "[]\n")
        eventually(lambda: not names(stack), "it left")
