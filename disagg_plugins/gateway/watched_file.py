"""Follows a file that lists workers: looks at it now and then, reads it when it changed.

All of it happens on a thread of its own, because a disk may stall; what was read is handed to the
event loop. A file that is missing or wrong changes nothing and is told.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_file import read_workers
from disagg_plugins.yaml_source import MAX_FILE_BYTES, read_bounded

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from disagg_plugins.policy import WorkerPolicy

Found = tuple["WorkerPolicy", ...] | ConfigError
"""The workers of the file, or what is wrong with it."""

Mark = tuple[int, int, int]
"""Modification time in nanoseconds, size and inode: one of them changes with the content."""


class WatchedFile:
    """One file that is followed.

    Args:
        path: The file.
        every_s: How often it is looked at.
        loop: Where ``found`` is called.
        found: Takes what the file says, at the beginning and after each change.
    """

    def __init__(
        self,
        path: Path,
        every_s: float,
        loop: asyncio.AbstractEventLoop,
        found: Callable[[Found], None],
    ) -> None:
        self._path = path
        self._every_s = every_s
        self._loop = loop
        self._found = found
        self._closing = threading.Event()
        self._mark: Mark | None = None
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="disagg-fleet-file", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """Stop following; a thread that hangs in the disk is left behind (daemon)."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            found = self.look()
            if found is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._found, found)
            self._closing.wait(self._every_s)

    def look(self) -> Found | None:
        """Return what the file says if it changed since the last look, else None."""
        try:
            mark = _mark(self._path)
            if mark == self._mark:
                return None
            content, _ = read_bounded(self._path, MAX_FILE_BYTES, "file of workers")
            self._mark = mark  # one that changed while it was read has another at the next look
            self._told = ""
            return read_workers(content, str(self._path))
        except ConfigError as exc:
            return self._problem(exc)
        except OSError as exc:
            self._mark = None
            return self._problem(
                ConfigError(f"cannot look at it: {exc.strerror}", file=str(self._path))
            )

    def _problem(self, problem: ConfigError) -> ConfigError | None:
        """Return a problem once, not at each look."""
        if str(problem) == self._told:
            return None
        self._told = str(problem)
        return problem


def _mark(path: Path) -> Mark:
    said = os.stat(path)
    return said.st_mtime_ns, said.st_size, said.st_ino
