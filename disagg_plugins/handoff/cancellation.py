"""A way to end a load from another thread, at once, whatever it waits for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from disagg_plugins.errors import HandoffAborted

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Channel


class Cancellation:
    """Given to one ``HandoffReader.load``; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason = ""
        self._channels: list[Channel] = []

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return bool(self._reason)

    def cancel(self, reason: str) -> None:
        """End the load; it raises soon, and within ``connect_s`` while it connects.

        Nothing happens after it has ended; idempotent.
        """
        with self._lock:
            self._reason = self._reason or reason or "cancelled"
            for channel in self._channels:
                channel.shut()

    def watch(self, channel: Channel) -> None:
        """Shut ``channel`` too when the load is cancelled."""
        with self._lock:
            self._channels.append(channel)
            if self._reason:
                channel.shut()

    def forget(self, channel: Channel) -> None:
        """Leave ``channel`` alone: it is about to be closed, and its descriptor used anew."""
        with self._lock:
            self._channels = [c for c in self._channels if c is not channel]

    def ended(self) -> None:
        """The load has ended: its channels belong to others now."""
        with self._lock:
            self._channels.clear()

    def check(self, handoff_id: str) -> None:
        """Raise unless the load may go on.

        Raises:
            HandoffAborted: It was cancelled.
        """
        if self._reason:
            raise HandoffAborted(handoff_id, self._reason)
