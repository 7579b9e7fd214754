"""Choosing, falling back and keeping channels."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import (
    HandoffTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from disagg_plugins.handoff.interfaces import Endpoint
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.testing.handoffs import (
    SECRET,
    RecordingSink,
    World,
    quick_policy,
    rank_identity,
    wait_until,
)

if TYPE_CHECKING:
    from disagg_plugins.types import HandoffEvent, HandoffPair


@pytest.fixture
def world():  # noqa: ANN201
    world = World({"shm": ShmTransport(), "tcp": TcpTransport()})
    yield world
    world.close()


def test_first_transport_of_the_policy_is_used(world: World) -> None:
    assert world.load(world.open(), RecordingSink()).transport == "shm"


def test_another_host_is_reached_over_tcp(world: World) -> None:
    world.endpoints = [replace(e, host_id="elsewhere") for e in world.endpoints]
    assert world.load(world.open(), RecordingSink()).transport == "tcp"


def test_choice_of_a_plugin_is_followed(world: World) -> None:
    asked: list[HandoffPair] = []

    def choose(pair: HandoffPair, offered: object) -> str:
        asked.append(pair)
        return "tcp"

    reader = HandoffReader(
        identity=rank_identity("decode"),
        transports=world.transports,
        policy=world.policy,
        secret=SECRET,
        choose=choose,
    )
    world.readers.append(reader)
    assert world.load(world.open(), RecordingSink(), reader=reader).transport == "tcp"
    assert asked[0].same_host
    assert asked[0].payload_bytes == 3 * 40 * 2 * 4 * 8 * 2


def test_falls_back_when_the_preferred_one_cannot_connect(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    dead = {**world.endpoints[0].addresses, "shm": "@disagg-kv-" + "0" * 32}
    world.endpoints = [replace(world.endpoints[0], addresses=dead)]
    reader = world.reader()
    with caplog.at_level(logging.WARNING):
        assert world.load(world.open(), RecordingSink(), reader=reader).transport == "tcp"
    assert reader.fallbacks == {"shm": 1}
    assert "shm cannot connect" in caplog.text


def test_nothing_in_common_is_said_with_both_sides(world: World) -> None:
    world.endpoints = [Endpoint(0, 1, "elsewhere", {"shm": "@x", "rdma": "y"})]
    with pytest.raises(TransportError, match=r"offers shm, rdma; this side has shm, tcp"):
        world.load(world.open(), RecordingSink())


def test_restarted_publisher_is_found_again(world: World) -> None:
    reader = world.reader()
    world.load(world.open(), RecordingSink(), reader=reader)
    world.listeners[0].close()
    listener = world.transports["tcp"].listen(
        world.store, world.store.identity, secret=SECRET, policy=world.policy
    )
    world.listeners.append(listener)
    world.endpoints = [replace(world.endpoints[0], addresses={"tcp": listener.address})]
    assert world.load(world.open(), RecordingSink(), reader=reader).transport == "tcp"


def test_slow_sink_meets_the_bound_of_the_whole_load(world: World) -> None:
    class Slow(RecordingSink):
        def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
            wait_until(lambda: False, "nothing", within_s=0.2) if layer == 1 else None

    class Patient(Slow):
        def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
            try:
                super().write_native(layer, first_block, rows)
            except TimeoutError:
                return

    reader = world.reader(policy=world.policy.model_copy(update={"load_s": 0.15}))
    with pytest.raises(HandoffTimeout, match="load_s"):
        world.load(world.open(), Patient(), reader=reader)
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")


@pytest.mark.parametrize(("first", "end"), [(-1, 4), (4, 4), (5, 4)])
def test_empty_ranges_are_our_bug(world: World, first: int, end: int) -> None:
    with pytest.raises(LocalProtocolError):
        world.load(world.open(), RecordingSink(), first_token=first, end_token=end)


def test_incomplete_endpoints_are_refused(world: World) -> None:
    world.endpoints = [replace(world.endpoints[0], tp_size=2)]
    with pytest.raises(RemoteProtocolError, match="one worker"):
        world.load(world.open(), RecordingSink())


def test_release_ends_a_handoff_that_is_not_needed(world: World) -> None:
    opened = world.open()
    world.reader().release(opened.handoff_id, opened.ticket, world.endpoints)
    assert world.outcomes() == {"consumed": 1}


def test_release_with_a_reason_fails_it(world: World) -> None:
    opened = world.open()
    world.reader().release(
        opened.handoff_id, opened.ticket, world.endpoints, failed="aborted by the client"
    )
    assert world.outcomes() == {"failed": 1}


def test_steps_are_told(world: World) -> None:
    events: list[HandoffEvent] = []
    reader = HandoffReader(
        identity=rank_identity("decode"),
        transports=world.transports,
        policy=world.policy,
        secret=SECRET,
        on_event=events.append,
    )
    world.readers.append(reader)
    world.load(world.open(), RecordingSink(), reader=reader)
    with pytest.raises(RuntimeError):
        world.load(world.open(), RecordingSink(fail_at=0), reader=reader)
    assert [e.step for e in events] == ["loaded", "failed"]
    assert events[0].detail["transport"] == "shm"


def test_long_prompts_are_read_in_bounded_pieces() -> None:
    world = World({"tcp": TcpTransport()}, policy=quick_policy(staging_bytes=256 << 20, load_s=20))
    num_tokens = 150_000
    opened, sink = world.open(num_tokens), RecordingSink()
    report = world.load(opened, sink, end_token=num_tokens)
    for layer in range(3):
        assert sink.layer(layer) == opened.rows[0][layer].tobytes()
    assert report.payload_bytes == sum(len(v) for v in sink.native.values())
    world.close()
