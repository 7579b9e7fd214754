"""A publisher's connection: packed rows, and authenticated peers that misbehave."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from disagg_kv_tcp import TcpTransport
from disagg_kv_tcp.transport import parse_address
from disagg_plugins.errors import HandoffAborted, RemoteProtocolError, TransportError
from disagg_plugins.handoff.frames import FrameType, pack_frame, pack_header
from disagg_plugins.handoff.messages import End, Read, encode
from disagg_plugins.handoff.pool import MAX_IDLE
from disagg_plugins.handoff.protocol import ClientSession
from disagg_plugins.handoff.tickets import new_handoff_id
from disagg_plugins.handoff.wire import PeerGone, Wire
from disagg_plugins.policy import WorkerPolicy
from disagg_plugins.testing.handoffs import (
    SECRET,
    WAIT_S,
    Opened,
    RecordingSink,
    World,
    quick_policy,
    rank_identity,
    wait_until,
)

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import LoadReport


def flip(rows: memoryview) -> memoryview:
    return (np.frombuffer(rows, np.uint8) ^ 0xFF).data


def test_packed_rows_are_unpacked_when_they_are_read() -> None:
    world = World({"tcp": TcpTransport()}, packing="flipped:1", unpack=flip)
    opened, sink = world.open(), RecordingSink()
    world.load(opened, sink, first_token=3, end_token=39)
    opened.rows[0] ^= 0xFF
    for layer in range(3):
        assert sink.layer(layer) == opened.canonical(world.store, 0, layer, 3, 39)
    world.close()


def test_equally_packed_rows_move_as_they_are() -> None:
    world = World({"tcp": TcpTransport()}, packing="flipped:1", unpack=flip)
    opened, sink = world.open(), RecordingSink()
    reader = world.reader(rank_identity("decode", packing="flipped:1"))
    assert world.load(opened, sink, reader=reader).form == "native"
    assert sink.layer(1) == opened.rows[0][1].tobytes()
    world.close()


def test_unpack_that_fails_fails_the_handoff_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken(rows: memoryview) -> memoryview:
        raise ValueError("broken on purpose")

    world = World({"tcp": TcpTransport()}, packing="broken:1", unpack=broken)
    # A captured record would keep the failed frames, and with them the arena, alive.
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(TransportError, match="ValueError"):
        world.load(world.open(), RecordingSink())
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
    world.close()


class RawPeer:
    """An authenticated peer that then sends what a test likes."""

    def __init__(self, world: World) -> None:
        sock = socket.create_connection(parse_address(world.listeners[0].address))
        self.wire = Wire(sock, transport="test", silence_s=WAIT_S)
        self.session = ClientSession(rank_identity("decode"), secret=SECRET, random=os.urandom)
        self.wire.send(self.session.hello())
        self.wire.send(self.session.challenge(self.receive()))
        self.session.welcome(self.receive())

    def receive(self) -> bytes:
        header = self.session.expect(self.wire.receive_header())
        payload = self.wire.receive_payload(header.payload_bytes)
        if header.type is FrameType.ERROR:
            raise self.session.error(payload)
        return payload

    def claim(self, ticket: str) -> None:
        self.wire.send(self.session.claim("h", ticket))
        self.session.offer(self.receive())


@pytest.fixture
def world() -> Iterator[World]:
    world = World({"tcp": TcpTransport()}, policy=quick_policy(lease_s=1, read_s=0.3))
    yield world
    world.close()


@pytest.mark.parametrize(
    "frame",
    [
        pack_header(FrameType.READ, 1 << 40),
        pack_header(FrameType.DATA, 100),
        pack_frame(FrameType.CLAIM, b"\x80"),
        pack_frame(FrameType.READ, b"\xc1"),
        pack_frame(FrameType.READ, encode(Read(0, 41, 0, 4, "native"))),
        pack_frame(FrameType.READ, encode(Read(0, 40, 3, 9, "canonical"))),
        pack_frame(FrameType.END, b"\x81\xa7outcome\xa3ate"),
        b"G" * 64,
    ],
)
def test_a_peer_that_breaks_the_rules_fails_its_handoff(world: World, frame: bytes) -> None:
    opened, peer = world.open(), RawPeer(world)
    peer.claim(opened.ticket)
    peer.wire.send(frame)
    with pytest.raises((RemoteProtocolError, PeerGone)):
        peer.receive()
    peer.wire.close()
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
    assert world.store.arena.used_bytes == 0


def test_a_peer_that_stops_reading_is_given_up(world: World) -> None:
    peer = RawPeer(world)
    big = World({"tcp": TcpTransport()}, policy=quick_policy(staging_bytes=64 << 20, read_s=0.3))
    opened, peer_of_big = big.open(100_000), RawPeer(big)
    peer_of_big.claim(opened.ticket)
    read = Read(0, 100_000, 0, 4, "native")
    peer_of_big.wire.send(peer_of_big.session.read(read)[0])
    wait_until(lambda: big.outcomes() == {"failed": 1}, "the giving up")
    peer_of_big.wire.close()
    big.close()
    peer.wire.close()


def test_end_after_the_lease_is_answered_truthfully(world: World) -> None:
    opened, peer = world.open(), RawPeer(world)
    peer.claim(opened.ticket)
    wait_until(lambda: world.outcomes() == {"expired": 1}, "the end of the lease")
    peer.wire.send(pack_frame(FrameType.END, encode(End("consumed", ""))))
    peer.session.phase = peer.session.phase.ENDING
    assert not peer.session.ended(peer.receive()).held
    peer.wire.close()


def test_reading_after_the_end_says_why(world: World) -> None:
    opened, peer = world.open(publish=False), RawPeer(world)
    peer.claim(opened.ticket)
    opened.publications[0].abort("preempted")
    peer.wire.send(peer.session.read(Read(0, 40, 0, 4, "native"))[0])
    with pytest.raises(HandoffAborted, match="preempted"):
        peer.receive()
    peer.wire.close()


def test_a_waiting_claim_is_told_that_the_publisher_lives(world: World) -> None:
    handoff_id, peer = new_handoff_id(), RawPeer(world)
    peer.wire.send(peer.session.claim(handoff_id, world.ticket(handoff_id), WAIT_S))
    for _ in range(5):  # four within read_s
        header = peer.session.expect(peer.wire.receive_header())
        assert (header.type, header.payload_bytes) == (FrameType.READY, 0)
    world.open(handoff_id=handoff_id)
    header = peer.session.expect(peer.wire.receive_header())
    while header.type is FrameType.READY:
        header = peer.session.expect(peer.wire.receive_header())
    offer = peer.session.offer(peer.wire.receive_payload(header.payload_bytes))
    assert offer.num_tokens == 40
    peer.wire.close()


def test_a_peer_that_leaves_while_waiting_is_let_go(world: World) -> None:
    handoff_id, peer = new_handoff_id(), RawPeer(world)
    peer.wire.send(peer.session.claim(handoff_id, world.ticket(handoff_id), 3600))
    peer.wire.close()
    wait_until(lambda: world.listeners[0].num_connections == 0, "the end of the connection")
    world.load(world.open(handoff_id=handoff_id), RecordingSink())


def test_mutated_frames_of_an_authenticated_peer(world: World) -> None:
    source = random.Random(8)
    for _ in range(25):
        opened, peer = world.open(), RawPeer(world)
        peer.claim(opened.ticket)
        frame = bytearray(pack_frame(FrameType.READ, encode(Read(0, 40, 0, 4, "native"))))
        frame[source.randrange(len(frame))] ^= 1 << source.randrange(8)
        peer.wire.send(bytes(frame))
        peer.wire.close()
    wait_until(lambda: sum(world.outcomes().values()) == 25, "the end of every handoff")
    assert world.store.arena.used_bytes == 0
    world.load(world.open(), RecordingSink())


def load(world: World, opened: Opened, *, wait_s: float) -> LoadReport:
    return world.reader().load(
        opened.handoff_id,
        opened.ticket,
        world.endpoints,
        first_token=0,
        end_token=40,
        sink=RecordingSink(),
        wait_s=wait_s,
    )


def test_a_prompt_that_the_engine_has_queued_is_waited_for(world: World) -> None:
    """As long as for a handoff that is not open yet: the peer said how long it will wait."""
    opened = world.open(publish=False)
    [publication] = opened.publications
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, world, opened, wait_s=WAIT_S)
        for _ in range(8):  # longer than read_s, and than the lease
            time.sleep(0.2)
            world.store.renew(publication)
        assert not loading.done()
        opened.publish()
        assert loading.result(WAIT_S).num_tokens == 40


def test_a_prompt_that_is_never_computed_is_given_up_after_the_wait(world: World) -> None:
    opened, started_s = world.open(publish=False), time.monotonic()
    with pytest.raises(HandoffAborted, match=r"handoff\.read_s"):
        load(world, opened, wait_s=0.4)
    assert 0.6 < time.monotonic() - started_s < WAIT_S


def test_loads_that_wait_at_a_full_prefill_worker_find_a_connection() -> None:
    """Each waits on one of its own, from every decode rank; channels kept idle count as well."""
    decode_ranks, requests = 4, WorkerPolicy.model_fields["capacity"].default
    idle = decode_ranks * MAX_IDLE
    assert quick_policy().max_connections >= decode_ranks * requests + idle
