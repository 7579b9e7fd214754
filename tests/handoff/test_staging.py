"""The arena: what it hands out, what it keeps, what it cannot do."""

from __future__ import annotations

import fcntl
import mmap
import os
import random

import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.handoff.staging import ALIGN_BYTES, ArenaFull, StagingArena

PAGE = ALIGN_BYTES


def test_ranges_are_low_aligned_and_apart() -> None:
    arena = StagingArena(8 * PAGE)
    a, b, c = arena.allocate(1), arena.allocate(PAGE + 1), arena.allocate(PAGE)
    assert (a, b, c) == (0, PAGE, 3 * PAGE)
    arena.free(a)
    assert arena.allocate(10) == 0
    arena.close()


def test_freed_neighbours_join() -> None:
    arena = StagingArena(4 * PAGE)
    ranges = [arena.allocate(PAGE) for _ in range(4)]
    with pytest.raises(ArenaFull):
        arena.allocate(1)
    for index in (1, 3, 2, 0):
        arena.free(ranges[index])
    assert arena.allocate(4 * PAGE) == 0
    assert (arena.used_bytes, arena.peak_bytes) == (4 * PAGE, 4 * PAGE)
    arena.close()


def test_free_is_exactly_once() -> None:
    arena = StagingArena(4 * PAGE)
    offset = arena.allocate(PAGE)
    arena.free(offset)
    for wrong in (offset, PAGE, 17):
        with pytest.raises(LocalProtocolError, match="twice or never"):
            arena.free(wrong)
    arena.close()


def test_random_use_never_overlaps_and_ends_empty() -> None:
    source, arena = random.Random(5), StagingArena(64 * PAGE)
    held: dict[int, int] = {}
    for _ in range(2000):
        if held and source.random() < 0.5:
            offset = source.choice(sorted(held))
            del held[offset]
            arena.free(offset)
            continue
        size = source.randrange(1, 9 * PAGE)
        try:
            offset = arena.allocate(size)
        except ArenaFull:
            continue
        end = offset + size
        assert all(end <= o or o + n <= offset for o, n in held.items())
        held[offset] = size
    for offset in held:
        arena.free(offset)
    assert arena.used_bytes == 0
    assert arena.allocate(64 * PAGE) == 0
    arena.close()


def test_nobody_else_can_resize_or_write_it() -> None:
    arena = StagingArena(PAGE)
    fd = arena.open_read_only()
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_GROW
        with pytest.raises(OSError, match="ermission|ermitted"):
            mmap.mmap(fd, PAGE, flags=mmap.MAP_SHARED)
        with pytest.raises(OSError, match="nvalid|ermitted"):
            os.ftruncate(fd, 10 * PAGE)
        assert arena.fd is not None
        with pytest.raises(PermissionError):
            mmap.mmap(arena.fd, PAGE, flags=mmap.MAP_SHARED)
        arena.view(0, 4)[:] = 7
        assert os.pread(fd, 4, 0) == b"\7\7\7\7"
    finally:
        os.close(fd)
        arena.close()


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, PAGE + 1), (PAGE, 1)])
def test_view_outside(offset: int, size: int) -> None:
    arena = StagingArena(PAGE)
    with pytest.raises(LocalProtocolError, match="outside"):
        arena.view(offset, size)
    arena.close()


def test_a_view_outlives_the_close() -> None:
    arena = StagingArena(PAGE)
    view = arena.view(0, 8)
    arena.close()
    arena.close()
    view[:] = 3
    assert view.sum() == 24
    with pytest.raises(LocalProtocolError, match="closed"):
        arena.allocate(1)
