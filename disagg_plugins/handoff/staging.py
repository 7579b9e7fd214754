"""The staging arena: one fixed piece of shareable memory that publications are cut from.

One memfd, mapped once, sealed so that it can neither shrink nor grow (a reader can never be hit
by SIGBUS) nor be mapped writable by anybody else. Memory of a killed process vanishes with its
last descriptor, so nothing is left behind. Pages are touched on first use only; the allocator
prefers low offsets, so resident memory follows the peak and then stays flat.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.errors import LocalProtocolError

if TYPE_CHECKING:
    import numpy.typing as npt

ALIGN_BYTES = 4096
"""A page, so that no two publications share one."""

F_SEAL_FUTURE_WRITE = 0x0010
"""Linux 5.1, ``linux/fcntl.h``; the constant reached Python's ``fcntl`` only in 3.13."""


class ArenaFull(Exception):
    """No free range is long enough; translated into ``StagingFull`` by the store."""

    def __init__(self, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(wanted_bytes, free_bytes)
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class StagingArena:
    """Memory of a fixed size, cut into page-aligned ranges; thread-safe.

    Args:
        size_bytes: Size, rounded up to a whole page.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = _round_up(max(1, size_bytes))
        self._lock = threading.Lock()
        self._fd = _create_memfd(self.size_bytes)
        try:
            self._map = (
                mmap.mmap(-1, self.size_bytes)
                if self._fd is None
                else mmap.mmap(self._fd, self.size_bytes, flags=mmap.MAP_SHARED)
            )
            if self._fd is not None:
                _seal(self._fd)
        except BaseException:
            if self._fd is not None:
                os.close(self._fd)
            raise
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self._free_offsets: list[int] = [0]
        self._free_lengths: dict[int, int] = {0: self.size_bytes}
        self._used: dict[int, int] = {}
        self._used_bytes = 0
        self._peak_bytes = 0
        self._closed = False

    @property
    def fd(self) -> int | None:
        """The memfd, for ``sendfile``; None on platforms without memfd."""
        return self._fd

    @property
    def used_bytes(self) -> int:
        """Bytes allocated now."""
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever allocated at once."""
        return self._peak_bytes

    def allocate(self, num_bytes: int) -> int:
        """Return the offset of a free range of at least ``num_bytes``, the lowest that fits.

        Raises:
            ArenaFull: No free range is long enough.
        """
        wanted = _round_up(num_bytes)
        with self._lock:
            if self._closed:
                raise LocalProtocolError("the staging arena is closed")
            index = self._first_fit(wanted)
            offset = self._free_offsets[index]
            length = self._free_lengths[offset]
            del self._free_lengths[offset]
            if length == wanted:
                del self._free_offsets[index]
            else:
                self._free_offsets[index] = offset + wanted
                self._free_lengths[offset + wanted] = length - wanted
            self._used[offset] = wanted
            self._used_bytes += wanted
            self._peak_bytes = max(self._peak_bytes, self._used_bytes)
            return offset

    def _first_fit(self, wanted: int) -> int:
        for index, offset in enumerate(self._free_offsets):
            if self._free_lengths[offset] >= wanted:
                return index
        raise ArenaFull(wanted, self.size_bytes - self._used_bytes)

    def free(self, offset: int) -> None:
        """Give a range back; exactly once for each ``allocate``.

        Raises:
            LocalProtocolError: No range is allocated at ``offset``.
        """
        with self._lock:
            length = self._used.pop(offset, None)
            if length is None:
                raise LocalProtocolError(f"staging range at {offset} freed twice or never taken")
            self._used_bytes -= length
            index = bisect_left(self._free_offsets, offset)
            end = offset + length
            if index < len(self._free_offsets) and self._free_offsets[index] == end:
                length += self._free_lengths.pop(end)
                del self._free_offsets[index]
            if index > 0:
                before = self._free_offsets[index - 1]
                if before + self._free_lengths[before] == offset:
                    self._free_lengths[before] += length
                    return
            self._free_offsets.insert(index, offset)
            self._free_lengths[offset] = length

    def view(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return a writable uint8 view of ``[offset, offset + num_bytes)``."""
        if not 0 <= offset <= offset + num_bytes <= self.size_bytes:
            raise LocalProtocolError(
                f"[{offset}, {offset + num_bytes}) is outside the arena of {self.size_bytes} bytes"
            )
        return self._bytes[offset : offset + num_bytes]

    def open_read_only(self) -> int:
        """Return a new read-only descriptor of the memory; the caller closes it.

        Raises:
            LocalProtocolError: The platform has no memfd, or the arena is closed.
        """
        with self._lock:
            if self._fd is None:
                raise LocalProtocolError("this platform has no memfd, so memory cannot be shared")
            if self._closed:
                raise LocalProtocolError("the staging arena is closed")
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last view of it goes. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._fd is not None:
                os.close(self._fd)
            self._bytes = np.empty(0, dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:
            # A writer still holds a view; dropping our reference leaves it the last owner.
            del self._map


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _create_memfd(size_bytes: int) -> int | None:
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("disagg-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seal(fd: int) -> None:
    fixed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:
        # Kernels before 5.1 lack the write seal; peers still get read-only descriptors.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fixed | fcntl.F_SEAL_SEAL)
