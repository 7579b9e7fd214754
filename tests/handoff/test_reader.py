"""Choosing, falling back and keeping channels."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import (
    HandoffAborted,
    HandoffTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from disagg_plugins.handoff.interfaces import Endpoint
from disagg_plugins.handoff.messages import MAX_RESULT_BYTES
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.handoff.tickets import new_handoff_id
from disagg_plugins.testing.handoffs import (
    LAYERS,
    SECRET,
    WAIT_S,
    Opened,
    RecordingSink,
    World,
    quick_policy,
    rank_identity,
    wait_until,
)
from tests.handoff.harness import EarlyLoad

if TYPE_CHECKING:
    from disagg_plugins.types import HandoffEvent, HandoffPair


@pytest.fixture
def world():  # noqa: ANN201
    world = World({"shm": ShmTransport(), "tcp": TcpTransport()})
    yield world
    world.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


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


def test_a_handoff_opened_after_its_claim_is_loaded(world: World, pool: ThreadPoolExecutor) -> None:
    early = EarlyLoad(world, pool)
    opened = world.open(handoff_id=early.handoff_id)
    assert early.result().num_tokens == 40
    for layer in range(LAYERS):
        assert early.sink.layer(layer) == opened.rows[0][layer].tobytes()
    assert world.outcomes() == {"consumed": 1}


def test_every_rank_is_waited_for() -> None:
    world = World({"tcp": TcpTransport()}, prefill_size=2)
    with ThreadPoolExecutor(1) as pool:
        early = EarlyLoad(world, pool)
        opened = world.open(handoff_id=early.handoff_id)
        early.result()
    for rank, store in enumerate(world.stores):
        kv = opened.canonical(store, rank, 1, 0, 40)
        assert early.sink.canonical[1, 0, store.identity.layout.head_start] == kv
    world.close()


def test_a_handoff_that_is_never_opened_is_named(world: World, pool: ThreadPoolExecutor) -> None:
    early = EarlyLoad(world, pool, wait_s=0.2)
    with pytest.raises(HandoffAborted, match="never opened here") as caught:
        early.result()
    assert caught.value.handoff_id == early.handoff_id


def test_waiting_longer_than_the_bound_on_silence() -> None:
    world = World({"tcp": TcpTransport()}, policy=quick_policy(read_s=0.5))
    with ThreadPoolExecutor(1) as pool:
        early = EarlyLoad(world, pool, wait_s=1.2)
        with pytest.raises(HandoffAborted, match="never opened here"):
            early.result()
    world.close()


def test_waiting_does_not_use_up_the_time_of_the_load() -> None:
    world = World({"tcp": TcpTransport()}, policy=quick_policy(load_s=0.5))
    with ThreadPoolExecutor(1) as pool:
        early = EarlyLoad(world, pool, wait_s=WAIT_S)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: False, "nothing", within_s=0.6)
        world.open(handoff_id=early.handoff_id)
        early.result()
    world.close()


def test_a_publisher_that_closes_ends_the_waiting(world: World, pool: ThreadPoolExecutor) -> None:
    early = EarlyLoad(world, pool)
    for listener in world.listeners:
        listener.close()
    with pytest.raises(TransportError):
        early.result()


def test_a_store_that_closes_ends_the_waiting(world: World, pool: ThreadPoolExecutor) -> None:
    early = EarlyLoad(world, pool)
    world.store.close()
    with pytest.raises(HandoffAborted, match="unknown"):
        early.result()


def test_without_waiting_a_claim_of_an_unopened_handoff_fails(world: World) -> None:
    handoff_id = new_handoff_id()
    opened = Opened(handoff_id, world.ticket(handoff_id), [], [])
    with pytest.raises(HandoffAborted, match="never opened here"):
        world.load(opened, RecordingSink())


@pytest.mark.parametrize("result", [b"", b"first token 17", bytes(MAX_RESULT_BYTES)])
@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_what_the_engine_leaves_beside_the_kv_is_reported(
    world: World, name: str, result: bytes
) -> None:
    address = {name: world.endpoints[0].addresses[name]}
    world.endpoints = [replace(world.endpoints[0], addresses=address)]
    opened = world.open(publish=False)
    opened.publish([0, 1])
    opened.publications[0].result = result
    opened.publish([2])
    assert world.load(opened, RecordingSink()).result == result


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
