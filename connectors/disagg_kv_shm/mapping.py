"""A publisher's staging memory, mapped read-only into a reader."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

from disagg_plugins.errors import RemoteProtocolError

MAX_ARENA_BYTES = 1 << 40
"""Far above any staging bound; a map of this size costs address space only."""


class PeerArena:
    """One read-only map; shared by the channels to one publisher.

    Args:
        fd: A sealed memfd that a peer sent; not kept.

    Raises:
        RemoteProtocolError: Not a memfd that is sealed against shrinking, or of absurd size.
    """

    def __init__(self, fd: int) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            self.size_bytes = os.fstat(fd).st_size
        except OSError as exc:
            raise RemoteProtocolError(f"the peer's memory is not a memfd: {exc}") from exc
        if not seals & fcntl.F_SEAL_SHRINK:
            raise RemoteProtocolError("the peer's memory could shrink under this process")
        if not 0 < self.size_bytes <= MAX_ARENA_BYTES:
            raise RemoteProtocolError(f"the peer's memory has {self.size_bytes} bytes")
        try:
            self._map = mmap.mmap(fd, self.size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError) as exc:
            raise RemoteProtocolError(f"the peer's memory cannot be mapped: {exc}") from exc
        self._view = memoryview(self._map)

    def rows(self, offset: int, num_bytes: int) -> memoryview:
        """Return a read-only view.

        Raises:
            RemoteProtocolError: The range is outside the peer's memory.
        """
        if offset + num_bytes > self.size_bytes:
            raise RemoteProtocolError(
                f"the peer points to [{offset}, {offset + num_bytes}), outside its memory of "
                f"{self.size_bytes} bytes"
            )
        return self._view[offset : offset + num_bytes]

    def close(self) -> None:
        """Unmap; a view that somebody still holds keeps the memory until it goes."""
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            del self._view, self._map


class ArenaCache:
    """The maps in use, one for each publisher's memory; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: dict[tuple[int, int], tuple[PeerArena, int]] = {}

    def __len__(self) -> int:
        return len(self._arenas)

    def acquire(self, fd: int) -> tuple[tuple[int, int], PeerArena]:
        """Return the map of a peer's memory and the key to release it with."""
        stat = os.fstat(fd)
        key = (stat.st_dev, stat.st_ino)
        with self._lock:
            arena, users = self._arenas.get(key, (None, 0))
            if arena is None:
                arena = PeerArena(fd)
            self._arenas[key] = (arena, users + 1)
            return key, arena

    def release(self, key: tuple[int, int]) -> None:
        """Give a map back; the last user unmaps it."""
        with self._lock:
            arena, users = self._arenas.pop(key)
            if users > 1:
                self._arenas[key] = (arena, users - 1)
                return
        arena.close()
