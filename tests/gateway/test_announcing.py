"""A worker's adapter is told of a handoff before its engine is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.errors import LocalProtocolError
from disagg_trtllm.announcements import Announcement, Announcements
from disagg_vllm.dialect import VllmDialect
from tests.gateway.harness import Stack, build_stack, eventually


class TellingDialect(VllmDialect):
    def announcement(self, step, ref, published) -> dict[str, Any]:
        told: dict[str, Any] = {
            "version": 1, "step": step, "request_id": ref.room | 1 << 40, "ticket": ref.ticket,
        }  # fmt: skip
        if step == "decode":
            told |= {"num_tokens": published.num_tokens, "prompt": "", "endpoints": [{}]}
        return told


class Plugin:
    @hookimpl
    def disagg_register_dialects(self) -> list[object]:
        return [TellingDialect()]


class Site:
    """A gateway, two engines, and what their adapters hear."""

    def __init__(self, stack: ExitStack, folder: Path, **gateway: Any) -> None:
        self.heard: list[Announcement] = []
        self.calls_before: list[int] = []
        self.refuse: set[str] = set()
        self.hang: set[str] = set()
        self.released = threading.Event()
        stack.callback(self.released.set)
        self.stack: Stack = build_stack(stack, folder, dialects=Plugin(), gateway=gateway)
        self.listener = Announcements("127.0.0.1", self._hear)
        stack.callback(self.listener.close)

    def _hear(self, said: Announcement) -> dict[str, object]:
        self.heard.append(said)
        engine = self.stack.engines["p0" if said.step == "prefill" else "d0"]
        self.calls_before.append(engine.seen.requests)
        if said.step in self.hang:
            self.released.wait(30)
        if said.step in self.refuse:
            raise LocalProtocolError("no room")
        return {}

    def introduce(self, *names: str) -> Site:
        """Let the adapters say where they listen."""
        fleet = self.stack.gateway.fleet
        for name in names or ("p0", "d0"):
            self.stack.call(
                lambda name=name: fleet.greet(name, {"announce": self.listener.address})
            )
            eventually(lambda name=name: fleet.announce_address(name), "it is known")
        return self


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:
        yield lambda **gateway: Site(stack, tmp_path, **gateway)


def test_each_call_is_announced_before_it_is_made(site) -> None:
    two = site().introduce()
    assert two.stack.complete()[0] == 200
    assert [said.step for said in two.heard] == ["prefill", "decode"]
    assert two.calls_before == [0, 0]
    assert len({said.request_id for said in two.heard}) == 1
    (record,) = two.stack.records(1)
    assert (record["route"], record["failures"]) == ("disaggregated", [])
    two.stack.wait_idle()


def test_without_an_address_nothing_is_split_and_the_reason_is_told(site) -> None:
    two = site().introduce("p0")
    assert two.stack.complete()[0] == 200
    assert two.heard == []
    assert two.stack.records(1)[0]["route"] == "local"
    (problem,) = two.stack.status()["split_problems"]
    assert "d0 has not said yet where it hears of handoffs" in problem


FALSE = [
    5, "", "no port", "http://h:1", "h:1/x", "h" * 300 + ":1", "h:0", "h:99999", "h:1234567",
    "[10.0.0.5:9000]:1234", "a..b:1", "h" * 64 + ":1", "-h:1", ":1", "h:",
]  # fmt: skip


@pytest.mark.parametrize("address", FALSE)
def test_an_address_that_is_none_is_not_kept(site, address: object) -> None:
    two = site()
    assert two.stack.gateway.fleet.greet("p0", {"announce": address}) is False
    assert two.stack.gateway.fleet.announce_address("p0") == ""


def test_a_prefill_whose_announcement_is_refused_is_not_asked(site) -> None:
    two = site().introduce()
    two.refuse = {"prefill"}
    assert two.stack.complete()[0] == 200
    assert two.stack.engines["p0"].seen.requests == 0
    (record,) = two.stack.records(1)
    (failure,) = record["failures"]
    assert (failure["side"], failure["kind"]) == ("prefill", "status")
    assert "no room" in failure["detail"]


def test_a_decode_whose_announcement_is_refused_is_asked_all_the_same(site) -> None:
    two = site().introduce()
    two.refuse = {"decode"}
    assert two.stack.complete()[0] == 200
    assert two.stack.engines["d0"].seen.requests == 1


def test_nobody_at_the_address_is_a_failure_of_prefill(site) -> None:
    two = site().introduce()
    two.listener.close()
    assert two.stack.complete()[0] == 200
    (failure,) = two.stack.records(1)[0]["failures"]
    assert failure["side"] == "prefill"
    assert "announcement" in failure["detail"]


def test_an_announcement_that_hangs_ends_with_the_calls_own_time(site) -> None:
    two = site(prefill_s=0.5).introduce()
    two.hang = {"prefill"}
    assert two.stack.complete()[0] == 200
    (failure,) = two.stack.records(1)[0]["failures"]
    assert (failure["side"], failure["kind"]) == ("prefill", "timeout")
    assert two.stack.engines["p0"].seen.requests == 0
    two.stack.wait_idle()


def test_a_client_that_goes_during_an_announcement_leaves_nothing(site) -> None:
    two = site().introduce()
    two.hang = {"prefill"}
    body = b'{"model": "fake-model", "prompt": "%s"}' % (b"word " * 100)
    sock = two.stack.raw(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    eventually(lambda: two.heard, "it is announced")
    sock.close()
    two.stack.wait_idle()
    assert two.stack.engines["p0"].seen.requests == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:65535", "worker-1.local:8000"])
def test_an_address_is_host_and_port(site, address: str) -> None:
    two = site()
    assert two.stack.gateway.fleet.greet("p0", {"announce": address}) is True
    assert two.stack.gateway.fleet.announce_address("p0") == address


def test_a_name_that_cannot_be_looked_up_is_a_failure_of_prefill(site) -> None:
    two = site().introduce()
    two.stack.call(lambda: two.stack.gateway.fleet.greet("p0", {"announce": "no-such.invalid:1"}))
    assert two.stack.complete()[0] == 200
    (failure,) = two.stack.records(1)[0]["failures"]
    assert failure["side"] == "prefill"
