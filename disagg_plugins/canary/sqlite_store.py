"""The memory of a rollout in one file: for gateways on one machine.

SQLite in WAL mode, fully synchronous: what was committed survives a killed process and a power
cut, and what was not leaves no trace. WAL needs memory shared between the processes, so the file
must be on a local disk; gateways on several machines share a PostgreSQL (``postgres_store``).
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.canary.sql_store import TABLES, SqlStore, Value
from disagg_plugins.errors import ConfigError, DamagedState, StoreUnavailable

if TYPE_CHECKING:
    from typing import LiteralString

    from disagg_plugins.canary.sql_store import Execute, Row

PAGE_BYTES = 4096
MOST_BYTES = 256 << 20
"""Of the file. A decision has some kB, so this is enough for tens of thousands."""

RETRY_S = 0.01
"""Between two tries to get a lock that SQLite itself does not wait for."""

APPEND_ONLY: tuple[LiteralString, ...] = (
    """CREATE TRIGGER disagg_canary_log_update BEFORE UPDATE ON disagg_canary_log
        BEGIN SELECT RAISE(ABORT, 'the log only grows'); END""",
    """CREATE TRIGGER disagg_canary_log_delete BEFORE DELETE ON disagg_canary_log
        BEGIN SELECT RAISE(ABORT, 'the log only grows'); END""",
)

DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
WORDS = {
    sqlite3.SQLITE_BUSY: "another process has kept it locked for {busy_s:g} s",
    sqlite3.SQLITE_LOCKED: "another process has kept it locked for {busy_s:g} s",
    sqlite3.SQLITE_FULL: "it is full, or its disk is: make room",
    sqlite3.SQLITE_READONLY: "it may not be written",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_IOERR: "its disk reports an error",
}


class SqliteStore(SqlStore):
    """A store in a file of mode 0600; made at the first use.

    Args:
        path: The file; its folder exists.
        canary: The name of the canary in it.
        busy_s: Longest wait for other processes and threads.
        clock: Seconds, for the lease.
        most_bytes: See ``MOST_BYTES``.
    """

    MIGRATIONS = ((*TABLES, *APPEND_ONLY),)

    def __init__(
        self,
        path: Path,
        canary: str = "default",
        *,
        busy_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        super().__init__(canary, clock)
        self._path = path
        self._busy_s = busy_s
        self._most_pages = max(1, most_bytes // PAGE_BYTES)
        self._lock = threading.Lock()  # one connection, many threads
        self._open: sqlite3.Connection | None = None
        self._inode: int | None = None

    @property
    def name(self) -> str:
        """The path."""
        return str(self._path)

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        """See ``SqlStore``."""
        if not self._lock.acquire(timeout=self._busy_s):
            raise StoreUnavailable(self.name, f"it has been in use here for {self._busy_s:g} s")
        try:
            with self._translated():
                connection = self._connection()
                connection.execute("BEGIN IMMEDIATE")
                yield _executor(connection)
                connection.execute("COMMIT")
        except BaseException:
            # whatever state it is in: the next call begins with a new one, which rolls back
            self._shut()
            raise
        finally:
            self._lock.release()

    def database_s(self, execute: Execute) -> float:
        """See ``SqlStore``; never asked, as there is a clock."""
        return time.time()

    def close(self) -> None:
        """See ``Store``."""
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        if self._open is not None and self._inode == self._inode_now():
            return self._open
        self._shut()  # a file that was moved away must not be written on by one process alone
        self._make_file()
        connection = sqlite3.connect(
            self._path, timeout=self._busy_s, isolation_level=None, check_same_thread=False
        )
        self._open, self._inode = connection, self._inode_now()
        self._into_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute(f"PRAGMA max_page_count = {self._most_pages}")
        connection.execute("BEGIN IMMEDIATE")
        self.migrate(_executor(connection))
        connection.execute("COMMIT")
        return connection

    def _into_wal(self, connection: sqlite3.Connection) -> None:
        """Switch to WAL, which SQLite does not wait for as it does for other locks."""
        until_s = time.monotonic() + self._busy_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                if time.monotonic() >= until_s:
                    raise
            time.sleep(RETRY_S)

    def _inode_now(self) -> int | None:
        try:
            return self._path.stat().st_ino
        except OSError:
            return None

    def _make_file(self) -> None:
        """Make the file for its owner alone; SQLite gives those beside it the same mode."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            problem = f"it cannot be opened: {exc.strerror}"
            raise StoreUnavailable(self.name, problem) from exc
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError("it is no file", file=self.name, key="canary.store.path")
        if found.st_mode & 0o077:
            raise ConfigError(
                f"others have access to the canary's memory (mode {found.st_mode & 0o777:04o})",
                file=self.name,
                key="canary.store.path",
                fix=f"chmod 600 {self._path}",
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            # the lower byte names the error, the higher ones the place
            code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
            if code in DAMAGED:
                raise DamagedState(f"canary store {self.name} is damaged ({exc})") from exc
            words = WORDS.get(code, str(exc)).format(busy_s=self._busy_s)
            raise StoreUnavailable(self.name, words) from exc


def _executor(connection: sqlite3.Connection) -> Execute:
    def execute(statement: LiteralString, values: Sequence[Value]) -> list[Row]:
        return connection.execute(statement, values).fetchall()

    return execute
