"""A channel against publishers that lie, stall or trickle, over a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from disagg_plugins.errors import (
    AuthenticationError,
    DisaggError,
    HandoffAborted,
    HandoffTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from disagg_plugins.handoff.client import SocketChannel, piece_sizes, ready_offsets
from disagg_plugins.handoff.frames import READY_ENTRY, FrameType, pack_frame, pack_header
from disagg_plugins.handoff.interfaces import Outcome
from disagg_plugins.handoff.protocol import ServerSession
from disagg_plugins.handoff.remote_errors import error_frame
from disagg_plugins.handoff.wire import Wire
from disagg_plugins.testing.handoffs import LAYERS, SECRET, WAIT_S, quick_policy, rank_identity

LAYER_BYTES = 3 * rank_identity("x").layout.row_bytes
Script = Callable[["FakePublisher"], None]


class FakePublisher:
    """Speaks the protocol correctly up to a point, then does what a test says."""

    def __init__(self, sock: socket.socket, script: Script) -> None:
        self.wire = Wire(sock, transport="test", silence_s=WAIT_S)
        self.session = ServerSession(rank_identity("prefill"), secret=SECRET, random=os.urandom)
        self.released = threading.Event()
        self._script = script
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def receive(self) -> bytes:
        header = self.session.expect(self.wire.receive_header())
        return self.wire.receive_payload(header.payload_bytes)

    def shake(self) -> None:
        self.wire.send(self.session.hello(self.receive()))
        self.wire.send(self.session.auth(self.receive()))

    def offer(self) -> None:
        self.shake()
        self.session.claim(self.receive())
        self.wire.send(self.session.offer(40))

    def asked(self) -> None:
        self.offer()
        self.session.read(self.receive(), 40)

    def rows(self) -> None:
        self.asked()
        for layer in range(LAYERS):
            self.wire.send(pack_header(FrameType.DATA, LAYER_BYTES, layer) + bytes(LAYER_BYTES))

    def stall(self) -> None:
        self.released.wait(WAIT_S)

    def _run(self) -> None:
        with contextlib.suppress(DisaggError, OSError):
            self._script(self)
        self.wire.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., SocketChannel]]:
    publishers: list[FakePublisher] = []
    channels: list[SocketChannel] = []

    def make(script: Script, **times: float) -> SocketChannel:
        ours, theirs = socket.socketpair()
        publishers.append(FakePublisher(theirs, script))
        channel = SocketChannel(
            ours,
            rank_identity("decode"),
            secret=SECRET,
            policy=quick_policy(**{"read_s": 0.2, "connect_s": 0.2, "load_s": 0.5, **times}),
            transport="test",
            started_s=time.monotonic(),
        )
        channels.append(channel)
        return channel

    yield make
    for channel in channels:
        channel.close()
    for publisher in publishers:
        publisher.released.set()
        publisher.thread.join(WAIT_S)
        assert not publisher.thread.is_alive()


def load(channel: SocketChannel) -> int:
    channel.claim("ticket")
    total = 0
    for _, rows in channel.read(first_token=0, end_token=40, first_head=0, end_head=4):
        total += len(rows)
    channel.end(Outcome.CONSUMED)
    return total


def lie(*frames: bytes, after: str = "asked") -> Script:
    def script(publisher: FakePublisher) -> None:
        getattr(publisher, after)()
        for frame in frames:
            publisher.wire.send(frame)
        publisher.stall()

    return script


def ready(layer: int, offset: int, num_bytes: int) -> bytes:
    return pack_frame(FrameType.READY, READY_ENTRY.pack(layer, offset, num_bytes))


def test_honest_publisher(connect: Callable[..., SocketChannel]) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.rows()
        publisher.session.end(publisher.receive())
        publisher.wire.send(publisher.session.ended(held=True, detail=""))

    assert load(connect(script)) == LAYERS * LAYER_BYTES


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([pack_header(FrameType.DATA, LAYER_BYTES - 1, 0)], "expected layer 0"),
        ([pack_header(FrameType.DATA, LAYER_BYTES, 1)], "expected layer 0"),
        ([pack_header(FrameType.DATA, 1 << 40, 0)], "announces"),
        ([pack_header(FrameType.ENDED, 3)], "out of order"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "does not speak"),
        ([ready(0, 0, LAYER_BYTES)], "shared memory"),
        ([ready(1, 0, LAYER_BYTES)], "READY of layer 1"),
        ([ready(0, 0, LAYER_BYTES + 1)], "READY of layer 0"),
        ([pack_frame(FrameType.READY, b"123")], "READY of 3 bytes"),
        ([pack_frame(FrameType.ERROR, b"\xc1")], "malformed"),
    ],
)
def test_lies_about_rows(
    connect: Callable[..., SocketChannel], frames: list[bytes], match: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        load(connect(lie(*frames)))


def test_false_proof(connect: Callable[..., SocketChannel]) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.wire.send(publisher.session.hello(publisher.receive()))
        frame = bytearray(publisher.session.auth(publisher.receive()))
        frame[40] ^= 1
        publisher.wire.send(bytes(frame))
        publisher.stall()

    with pytest.raises((AuthenticationError, RemoteProtocolError)):
        connect(script)


@pytest.mark.parametrize("after", ["nothing", "shake", "offer", "asked", "rows"])
def test_silence_is_bounded_at_every_step(
    connect: Callable[..., SocketChannel], after: str
) -> None:
    def script(publisher: FakePublisher) -> None:
        if after != "nothing":
            getattr(publisher, after)()
        publisher.stall()

    started_s = time.monotonic()
    wanted = TransportError if after == "nothing" else HandoffTimeout
    with pytest.raises(wanted, match=r"connect_s|read_s"):
        load(connect(script))
    assert time.monotonic() - started_s < 1.5


@pytest.mark.parametrize("after", ["nothing", "shake", "offer", "asked", "rows"])
def test_a_closed_connection_is_a_transport_error(
    connect: Callable[..., SocketChannel], after: str
) -> None:
    def script(publisher: FakePublisher) -> None:
        if after != "nothing":
            getattr(publisher, after)()

    with pytest.raises(TransportError, match=r"closed|lost"):
        load(connect(script))


def test_trickling_publisher_meets_the_deadline(connect: Callable[..., SocketChannel]) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.asked()
        publisher.wire.send(pack_header(FrameType.DATA, LAYER_BYTES, 0))
        while not publisher.released.wait(0.05):
            publisher.wire.send(b"x")

    started_s = time.monotonic()
    with pytest.raises(HandoffTimeout, match="load_s"):
        load(connect(script))
    assert time.monotonic() - started_s < 1.5


def test_keepalives_do_not_move_the_deadline(connect: Callable[..., SocketChannel]) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.asked()
        while not publisher.released.wait(0.05):
            publisher.wire.send(pack_frame(FrameType.READY, b""))

    started_s = time.monotonic()
    with pytest.raises(HandoffTimeout, match="load_s"):
        load(connect(script))
    assert time.monotonic() - started_s < 1.5


def test_an_offer_may_come_after_words_of_life(connect: Callable[..., SocketChannel]) -> None:
    waits_s: list[float] = []

    def script(publisher: FakePublisher) -> None:
        publisher.shake()
        waits_s.append(publisher.session.claim(publisher.receive()).wait_s)
        for _ in range(12):
            publisher.released.wait(0.05)  # in all longer than read_s
            publisher.wire.send(pack_frame(FrameType.READY, b""))
        publisher.wire.send(publisher.session.offer(40))
        publisher.stall()

    assert connect(script, read_s=0.5, load_s=5).claim("ticket", wait_s=4).num_tokens == 40
    assert waits_s == [4]


def test_rows_before_an_offer(connect: Callable[..., SocketChannel]) -> None:
    with pytest.raises(RemoteProtocolError, match="rows before an offer"):
        load(connect(lie(ready(0, 0, LAYER_BYTES), after="shake")))


def test_the_publishers_word_decides(connect: Callable[..., SocketChannel]) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.rows()
        publisher.session.end(publisher.receive())
        publisher.wire.send(publisher.session.ended(held=False, detail="expired: too late"))

    with pytest.raises(HandoffAborted, match="expired: too late"):
        load(connect(script))


@pytest.mark.parametrize(
    "sent", [AuthenticationError("no"), HandoffAborted("h", "gone"), RemoteProtocolError("bad")]
)
def test_errors_arrive_as_what_they_are(
    connect: Callable[..., SocketChannel], sent: DisaggError
) -> None:
    with pytest.raises(type(sent)):
        load(connect(lie(error_frame(sent), after="offer")))


def test_rows_go_straight_to_where_the_sink_wants_them(
    connect: Callable[..., SocketChannel],
) -> None:
    def script(publisher: FakePublisher) -> None:
        publisher.asked()
        for layer in range(LAYERS):
            rows = bytes([layer + 1]) * LAYER_BYTES
            publisher.wire.send(pack_header(FrameType.DATA, LAYER_BYTES, layer) + rows)
        publisher.stall()

    channel = connect(script)
    channel.claim("ticket")
    memory = [bytearray(LAYER_BYTES) for _ in range(LAYERS)]

    def place(layer: int) -> list[memoryview] | None:
        view = memoryview(memory[layer])
        return None if layer == 1 else [view[:100], view[100:100], view[100:]]

    ranges = {"first_token": 0, "end_token": 40, "first_head": 0, "end_head": 4}
    yielded = [(layer, bytes(rows)) for layer, rows in channel.read(**ranges, place=place)]  # type: ignore[arg-type]
    assert yielded == [(0, b""), (1, b"\2" * LAYER_BYTES), (2, b"")]
    assert (memory[0], memory[2]) == (b"\1" * LAYER_BYTES, b"\3" * LAYER_BYTES)


def test_room_of_a_wrong_size_is_our_bug(connect: Callable[..., SocketChannel]) -> None:
    channel = connect(lambda publisher: publisher.rows())
    channel.claim("ticket")
    ranges = {"first_token": 0, "end_token": 40, "first_head": 0, "end_head": 4}
    with pytest.raises(LocalProtocolError, match="room for 5 bytes"):
        next(channel.read(**ranges, place=lambda _: [memoryview(bytearray(5))]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("layer_bytes", "unit"), [(10 << 20, 3000), (5, 5), (1 << 20, 1 << 20)])
def test_pieces_are_whole_units_and_sum_up(layer_bytes: int, unit: int) -> None:
    layer_bytes = layer_bytes // unit * unit
    sizes = list(piece_sizes(layer_bytes, unit))
    assert sum(sizes) == layer_bytes
    assert all(size % unit == 0 and size <= max(unit, 256 << 10) for size in sizes)


def test_ready_offsets_of_several_layers() -> None:
    payload = READY_ENTRY.pack(3, 70, 10) + READY_ENTRY.pack(4, 90, 10)
    assert ready_offsets(payload, 3, 10, 5) == [70, 90]
    assert ready_offsets(b"", 3, 10, 5) == []
    with pytest.raises(RemoteProtocolError):
        ready_offsets(payload, 3, 10, 4)
