from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from disagg_plugins.handoff.wire import (
    LOW_WATER_BYTES,
    SEND_BYTES,
    PeerGone,
    PeerSilent,
    Wire,
    split_tail,
)

WAIT_S = 10.0
BULK_BYTES = 3 * SEND_BYTES + 12_345


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        ours = socket.create_connection(server.getsockname())
        return ours, server.accept()[0]


@pytest.fixture(params=["tcp", "unix"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Wire, Wire]]:
    pair = tcp_pair() if request.param == "tcp" else socket.socketpair()
    ours, theirs = (Wire(sock, transport="test", silence_s=WAIT_S) for sock in pair)
    yield ours, theirs
    ours.close()
    theirs.close()


def in_thread(work: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("sizes", "bulk", "tail"),
    [
        ([], [], []),
        ([3], [], [3]),
        ([4, 4], [4], [4]),
        ([7], [], [7]),
        ([8], [4], [4]),
        ([9], [5], [4]),
        ([2, 2, 2, 2, 2], [2, 2, 2], [2, 2]),
        ([5, 2, 3], [5, 1], [1, 3]),
        ([1, 9], [1, 5], [4]),
        ([9, 1], [6], [3, 1]),
    ],
)
def test_views_are_cut_before_the_tail(sizes: list[int], bulk: list[int], tail: list[int]) -> None:
    source = bytes(range(sum(sizes)))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(source)[at : at + size])
        at += size
    head, rest = split_tail(views, 4)
    assert ([len(v) for v in head], [len(v) for v in rest]) == (bulk, tail)
    assert b"".join([*head, *rest]) == source


def test_bulk_arrives_whole_and_a_short_frame_behind_it_at_once(ends: tuple[Wire, Wire]) -> None:
    ours, theirs = ends
    payload = os.urandom(BULK_BYTES)
    sending = in_thread(theirs.send_pair, b"h" * 16, memoryview(payload))
    got = bytearray(BULK_BYTES)
    assert ours.receive_header() == b"h" * 16
    view = memoryview(got)
    ours.receive_scattered([view[:7], view[7:100_000], view[100_000:]])
    sending.join(WAIT_S)
    assert got == payload
    theirs.send(b"e" * 16)
    assert ours.receive_header() == b"e" * 16


def test_bytes_that_trickle_in_below_the_low_water_mark_are_taken(ends: tuple[Wire, Wire]) -> None:
    ours, theirs = ends
    payload = os.urandom(2 * LOW_WATER_BYTES)
    ours.set_silence(0.05)  # ends every wait for the mark before it is reached

    def trickle() -> None:
        for start in range(0, len(payload), 1 << 15):
            theirs.send(payload[start : start + (1 << 15)])
            threading.Event().wait(0.01)

    sending = in_thread(trickle)
    got = bytearray(len(payload))
    ours.receive_into(memoryview(got))
    sending.join(WAIT_S)
    assert got == payload


@pytest.mark.parametrize("sent_bytes", [0, 1, LOW_WATER_BYTES, 3 * LOW_WATER_BYTES])
def test_peer_that_stops_within_bulk_is_silent_and_one_that_leaves_is_gone(
    ends: tuple[Wire, Wire], sent_bytes: int
) -> None:
    ours, theirs = ends
    got = memoryview(bytearray(4 * LOW_WATER_BYTES))
    ours.set_silence(0.05)
    sending = in_thread(theirs.send, bytes(sent_bytes))
    with pytest.raises(PeerSilent):
        ours.receive_into(got)
    sending.join(WAIT_S)
    ours.set_silence(WAIT_S)
    theirs.close()
    with pytest.raises(PeerGone):
        ours.receive_into(got)
