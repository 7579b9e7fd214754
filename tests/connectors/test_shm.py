"""What a reader accepts as a peer's memory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from disagg_kv_shm.mapping import ArenaCache, PeerArena
from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.testing.handoffs import open_descriptors

PAGE = 4096


@pytest.fixture
def arena() -> Iterator[StagingArena]:
    arena = StagingArena(4 * PAGE)
    yield arena
    arena.close()


def test_reads_what_the_publisher_wrote(arena: StagingArena) -> None:
    fd = arena.open_read_only()
    peer = PeerArena(fd)
    os.close(fd)
    arena.view(PAGE, 3)[:] = 5
    assert bytes(peer.rows(PAGE, 3)) == b"\5\5\5"
    assert peer.rows(0, 1).readonly
    peer.close()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 4 * PAGE + 1), (4 * PAGE, 1), (1 << 63, 1), (1, (1 << 64) - 1)]
)
def test_places_outside_the_memory(arena: StagingArena, offset: int, size: int) -> None:
    fd = arena.open_read_only()
    peer = PeerArena(fd)
    os.close(fd)
    with pytest.raises(RemoteProtocolError, match="outside"):
        peer.rows(offset, size)
    peer.close()


def test_memory_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(RemoteProtocolError, match="shrink"):
        PeerArena(fd)
    os.close(fd)


def test_empty_memory_is_refused() -> None:
    fd = os.memfd_create("empty", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(RemoteProtocolError, match="0 bytes"):
        PeerArena(fd)
    os.close(fd)


def test_what_is_no_memory_is_refused() -> None:
    ends = os.pipe()
    with pytest.raises(RemoteProtocolError, match="memfd"):
        PeerArena(ends[0])
    for fd in ends:
        os.close(fd)


def test_one_map_for_all_channels_to_a_publisher(arena: StagingArena) -> None:
    before, cache = open_descriptors(), ArenaCache()
    fds = [arena.open_read_only() for _ in range(3)]
    taken = [cache.acquire(fd) for fd in fds]
    for fd in fds:
        os.close(fd)
    assert len({id(peer) for _, peer in taken}) == len(cache) == 1
    for key, _ in taken:
        cache.release(key)
    assert len(cache) == 0
    assert open_descriptors() == before


def test_a_view_that_is_still_held_outlives_the_map(arena: StagingArena) -> None:
    fd = arena.open_read_only()
    peer = PeerArena(fd)
    os.close(fd)
    view = peer.rows(0, 4)
    peer.close()
    assert bytes(view) == bytes(4)
