"""One thread for one third-party plugin, so that its calls can be given a deadline.

Python cannot end a running function. So a call that overruns is left behind on its thread: the
caller goes on, and until the call returns the plugin is busy and is not asked again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_Work = Callable[[], object]
_Answer = tuple[bool, object]


class OverranError(Exception):
    """The call did not return within its deadline; it still runs."""


class BusyError(Exception):
    """An earlier call still runs, or other callers kept the thread busy."""


class RaisedError(Exception):
    """The call raised; ``cause`` is what it raised, ``SystemExit`` included."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


class PluginThread:
    """Runs calls of one plugin, one at a time, on one daemon thread. Thread-safe.

    The thread starts with the first call. After a fork the child starts its own.
    """

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self._closed = False
        self._thread: threading.Thread | None = None
        self._outstanding = False
        self._renew()

    def call(self, work: Callable[[], T], timeout_s: float) -> T:
        """Return what ``work()`` returns.

        Args:
            work: Called on the plugin's thread.
            timeout_s: Bound on waiting for the thread to be free, and again on the call.

        Raises:
            RaisedError: ``work`` raised anything.
            OverranError: ``work`` did not return in time.
            BusyError: The thread was not free.
        """
        if self._pid != os.getpid():
            self._renew()
        if not self._lock.acquire(timeout=timeout_s):
            raise BusyError(f"other calls kept it busy for {timeout_s:g} s")
        try:
            succeeded, value = self._exchange(work, timeout_s)
        finally:
            self._lock.release()
        if isinstance(value, BaseException) and not succeeded:
            raise RaisedError(value) from value
        return value  # type: ignore[return-value]  # what work() returned

    def close(self, timeout_s: float) -> bool:
        """End the thread; return False when a call that overran still holds it."""
        self._closed = True
        if self._pid != os.getpid() or self._thread is None:
            return True
        self._work.put(None)
        self._thread.join(timeout_s)
        # An idle thread that was not scheduled yet ends by itself; only a call holds one.
        return not (self._thread.is_alive() and self._outstanding)

    def _exchange(self, work: _Work, timeout_s: float) -> _Answer:
        if self._closed:
            raise BusyError("the host is closed")
        if self._outstanding:
            try:
                self._answers.get_nowait()
            except Empty:
                raise BusyError("an earlier call has not returned yet") from None
            self._outstanding = False
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve,
                args=(self._work, self._answers),
                name=f"disagg-plugin-{self.plugin}",
                daemon=True,
            )
            self._thread.start()
        self._outstanding = True
        self._work.put(work)
        try:
            answer = self._answers.get(timeout=timeout_s)
        except Empty:
            raise OverranError(f"no answer within {timeout_s:g} s") from None
        self._outstanding = False
        return answer

    def _renew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._answers: SimpleQueue[_Answer] = SimpleQueue()
        self._thread = None
        self._outstanding = False


def _serve(work: SimpleQueue[_Work | None], answers: SimpleQueue[_Answer]) -> None:
    while (call := work.get()) is not None:
        try:
            answer = (True, call())
        except BaseException as exc:  # a plugin's SystemExit must not end its thread either
            answer = (False, exc)
        answers.put(answer)
        del call, answer
