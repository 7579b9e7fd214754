"""Idle channels, kept for the next handoff with the same peer.

A handshake costs a few round trips and, over shared memory, the mapping; keeping a channel saves
both. The pool is bounded, closes what has been idle too long, and looks before it lends.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from disagg_plugins.handoff.interfaces import Channel

MAX_IDLE = 64
"""Idle channels in all: prefill ranks that one decode rank keeps talking to."""

Key = tuple[str, str]
"""Transport name and address."""


class ChannelPool:
    """Idle channels by transport and address; thread-safe.

    Args:
        idle_s: A channel that was idle for longer is closed.
        max_idle: Idle channels in all; the longest idle one is closed for a new one.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        idle_s: float,
        max_idle: int = MAX_IDLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Key, Channel]] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, key: Key) -> Channel | None:
        """Return an idle, healthy channel to ``key``, the most recently used, or None."""
        self.prune()
        while True:
            with self._lock:
                for index in range(len(self._idle) - 1, -1, -1):
                    if self._idle[index][1] == key:
                        channel = self._idle.pop(index)[2]
                        break
                else:
                    return None
            if getattr(channel, "reusable", True):
                return channel
            channel.close()

    def give(self, key: Key, channel: Channel) -> None:
        """Keep ``channel`` for later; a closed pool closes it."""
        surplus: Channel | None = None
        with self._lock:
            if self._closed:
                surplus = channel
            else:
                self._idle.append((self._clock(), key, channel))
                if len(self._idle) > self._max_idle:
                    surplus = self._idle.pop(0)[2]
        if surplus is not None:
            surplus.close()

    def prune(self) -> None:
        """Close what has been idle too long."""
        oldest_s = self._clock() - self._idle_s
        with self._lock:
            stale = [entry for entry in self._idle if entry[0] < oldest_s]
            self._idle = [entry for entry in self._idle if entry[0] >= oldest_s]
        for _, _, channel in stale:
            channel.close()

    def close(self) -> None:
        """Close every idle channel, and each one that is given back from now on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, _, channel in idle:
            channel.close()
