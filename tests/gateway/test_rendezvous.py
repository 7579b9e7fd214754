"""The second family through the same server: both workers are called at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_vllm.dialect import VllmDialect
from tests.gateway.harness import Stack, eventually

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.types import Family

Build = Callable[..., Stack]


class RoomDialect(VllmDialect):
    """Both sides meet in a room whose number the gateway chose."""

    family: Family = "rendezvous"

    def handoff_params(self, answer: Body) -> Body:
        raise LocalProtocolError("a rendezvous has no params")

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        return {**super().prefill_body(body, ref), "room": ref.room, "address": ref.address}

    def decode_body(self, body: Body, ref: HandoffRef, params: Body | None) -> Body:
        assert params is None
        return {**super().decode_body(body, ref, params), "room": ref.room, "address": ref.address}


class RoomPlugin:
    @hookimpl
    def disagg_register_dialects(self) -> list[RoomDialect]:
        return [RoomDialect()]


def test_both_are_called_with_the_same_room(build: Build) -> None:
    stack = build(dialects=RoomPlugin())
    assert stack.complete(stream=True)[0] == 200
    stack.wait_idle()
    ours = stack.engines["p0"].seen.bodies[-1]
    theirs = stack.engines["d0"].seen.bodies[-1]
    assert ours["room"] == theirs["room"]
    assert ours["address"] == theirs["address"]
    assert stack.engines["p0"].url.endswith(str(ours["address"]))


def test_prefill_failure_restarts_decode_alone(build: Build) -> None:
    stack = build(
        dialects=RoomPlugin(),
        behaviours={
            "p0": Behaviour(status=500),
            "d0": Behaviour(first_s=0.2, tokens=3),
        },
    )
    assert stack.complete()[0] == 200
    stack.wait_idle()
    seen = stack.engines["d0"].seen
    assert seen.requests == 2
    assert "kv_transfer_params" not in seen.bodies[-1]
    eventually(lambda: seen.aborted == 1, "the waiting decode was cancelled")


def test_client_gone_cancels_both(build: Build) -> None:
    hang = {"p0": Behaviour(hang="head"), "d0": Behaviour(hang="head")}
    stack = build(dialects=RoomPlugin(), behaviours=hang)
    body = b'{"model":"fake-model","prompt":"' + b"word " * 300 + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen
        eventually(lambda seen=seen: seen.requests == 1, f"{name} works")
    sock.close()
    stack.wait_idle()
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen
        eventually(lambda seen=seen: seen.aborted == 1, f"{name} sees the abort")


def test_decode_failure_cancels_prefill_and_retries_alone(build: Build) -> None:
    stack = build(
        dialects=RoomPlugin(),
        behaviours={"p0": Behaviour(hang="head"), "d0": Behaviour(status=500, times=1)},
    )
    assert stack.complete()[0] == 200
    stack.wait_idle()
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill was cancelled")
