"""A load is ended from another thread, whatever it waits for, and its publisher is let go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import HandoffAborted
from disagg_plugins.handoff.cancellation import Cancellation
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.testing.handoffs import (
    SECRET,
    WAIT_S,
    Opened,
    RecordingSink,
    World,
    quick_policy,
    wait_until,
)
from tests.handoff.harness import LONG_S, EarlyLoad

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import LoadReport, Transport

PATIENT = {"lease_s": LONG_S, "read_s": LONG_S, "load_s": LONG_S}
"""Nothing but the cancellation ends a load within the test."""


@pytest.fixture(params=[ShmTransport, TcpTransport])
def transport(request: pytest.FixtureRequest) -> Transport:
    return request.param()


@pytest.fixture
def world(transport: Transport) -> Iterator[World]:
    world = World({transport.name: transport}, policy=quick_policy(**PATIENT))
    yield world
    world.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def start(
    world: World, pool: ThreadPoolExecutor, opened: Opened, **arguments: Any
) -> Future[LoadReport]:
    """Load ``opened`` beside the test; return when its first layer has arrived."""
    sink = RecordingSink()
    loading = pool.submit(world.load, opened, sink, **arguments)
    opened.publish([0])
    wait_until(lambda: sink.has_layers(1), "the first layer")
    return loading


def test_while_waiting_for_the_handoff_to_be_opened(world: World, pool: ThreadPoolExecutor) -> None:
    cancellation = Cancellation()
    early = EarlyLoad(world, pool, cancellation=cancellation)
    cancellation.cancel("the client left")
    with pytest.raises(HandoffAborted, match="the client left") as caught:
        early.result()
    assert caught.value.handoff_id == early.handoff_id
    assert early.sink.empty
    wait_until(lambda: world.listeners[0].num_connections == 0, "the end of the connection")
    world.load(world.open(handoff_id=early.handoff_id), RecordingSink())


def test_while_waiting_on_a_channel_of_an_earlier_load(
    world: World, pool: ThreadPoolExecutor
) -> None:
    reader, cancellation = world.reader(), Cancellation()
    world.load(world.open(), RecordingSink(), reader=reader)
    early = EarlyLoad(world, pool, reader=reader, cancellation=cancellation)
    cancellation.cancel("the client left")
    with pytest.raises(HandoffAborted, match="the client left") as caught:
        early.result()
    assert caught.value.handoff_id == early.handoff_id


def test_while_waiting_for_layers(world: World, pool: ThreadPoolExecutor) -> None:
    cancellation, opened = Cancellation(), world.open(publish=False)
    loading = start(world, pool, opened, cancellation=cancellation)
    cancellation.cancel("the client left")
    # Looked at, not raised: this test's own frame would keep the rows that were read, and the map.
    error = loading.exception(WAIT_S)
    assert isinstance(error, HandoffAborted)
    assert "the client left" in str(error)
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the publisher's word")
    opened.publish([1, 2])
    assert world.store.arena.used_bytes == 0


def test_between_two_ranks(transport: Transport) -> None:
    world = World({transport.name: transport}, policy=quick_policy(**PATIENT), prefill_size=2)
    cancellation = Cancellation()
    ticket = verify(SECRET, world.ticket("a" * 32), time.time())
    first = world.stores[0].open(ticket, 40)
    with ThreadPoolExecutor(1) as pool:
        early = EarlyLoad(
            world, pool, handoff_id=ticket.handoff_id, cancellation=cancellation, waits_at=1
        )
        cancellation.cancel("the client left")
        with pytest.raises(HandoffAborted, match="the client left"):
            early.result()
    wait_until(lambda: first.outcome == "failed", "the end on the rank that was claimed")
    first.abort("nobody wants it")
    world.close()


def test_before_the_start(world: World) -> None:
    cancellation, opened, sink = Cancellation(), world.open(), RecordingSink()
    cancellation.cancel("the client left")
    with pytest.raises(HandoffAborted, match="the client left"):
        world.load(opened, sink, cancellation=cancellation)
    assert sink.empty
    assert world.listeners[0].num_connections == 0
    world.reader().release(opened.handoff_id, opened.ticket, world.endpoints, failed="cancelled")
    assert world.outcomes() == {"failed": 1}


def test_after_the_end_nothing_happens(world: World, pool: ThreadPoolExecutor) -> None:
    reader, ended = world.reader(), Cancellation()
    world.load(world.open(), RecordingSink(), reader=reader, cancellation=ended)
    opened = world.open(publish=False)
    loading = start(world, pool, opened, reader=reader)
    ended.cancel("too late")
    opened.publish([1, 2])
    loading.result(WAIT_S)
    assert world.listeners[0].num_connections == 1
    assert world.outcomes() == {"consumed": 2}


def test_after_a_failure_nothing_happens(world: World) -> None:
    cancellation = Cancellation()
    with pytest.raises(RuntimeError, match="on purpose"):
        world.load(world.open(), RecordingSink(fail_at=1), cancellation=cancellation)
    cancellation.cancel("too late")
    world.load(world.open(), RecordingSink())


def test_the_first_reason_counts() -> None:
    cancellation = Cancellation()
    assert not cancellation.cancelled
    cancellation.cancel("the client left")
    cancellation.cancel("")
    assert cancellation.cancelled
    with pytest.raises(HandoffAborted, match="the client left"):
        cancellation.check("h")


def test_an_empty_reason_cancels_too() -> None:
    cancellation = Cancellation()
    cancellation.cancel("")
    assert cancellation.cancelled
