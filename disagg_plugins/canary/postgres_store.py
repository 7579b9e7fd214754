"""The memory of a rollout in PostgreSQL: for gateways on several machines.

psycopg 3 is imported when a store is made, and not before. The lease's time is the server's, so the
gateways' clocks may differ.

Every wait ends: the server gives up on a statement or a lock (``statement_timeout``), the kernel on
a peer that acknowledges nothing (``tcp_user_timeout``), and a watchdog shuts the socket of a server
that acknowledges and says nothing. The DSN never shows in an error, a log line or a ``repr``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from disagg_plugins.canary.sql_store import TABLES, SqlStore, Value
from disagg_plugins.canary.state import number
from disagg_plugins.errors import ConfigError, DamagedState, StoreUnavailable

if TYPE_CHECKING:
    from typing import LiteralString

    import psycopg

    from disagg_plugins.canary.sql_store import Execute, Row

    Connection = psycopg.Connection[Row]

APPEND_ONLY: tuple[LiteralString, ...] = (
    """CREATE OR REPLACE FUNCTION disagg_canary_log_grows() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'the log only grows'; END $$""",
    """CREATE TRIGGER disagg_canary_log_grows
        BEFORE UPDATE OR DELETE OR TRUNCATE ON disagg_canary_log
        FOR EACH STATEMENT EXECUTE FUNCTION disagg_canary_log_grows()""",
)

MIGRATION_LOCK = 0x64697361
"""Any number of our own ("disa"): advisory locks of a database share their numbers."""

LEAST_CONNECT_S = 2
"""libpq takes no less."""


class PostgresStore(SqlStore):
    """A store in a database that exists; its tables are made at the first use.

    Args:
        dsn: As libpq takes it: ``postgresql://...`` or ``host=... dbname=...``.
        canary: The name of the canary in it.
        busy_s: Longest wait for an answer of the server.
        clock: Seconds, for the lease; None: the server's.

    Raises:
        ConfigError: psycopg is not installed, or the DSN is none.
    """

    MIGRATIONS = ((*TABLES, *APPEND_ONLY),)
    LOCKED = " FOR UPDATE"

    def __init__(
        self,
        dsn: str,
        canary: str = "default",
        *,
        busy_s: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(canary, clock)
        self._busy_s = busy_s
        self._settings, self._password = _settings(dsn, busy_s)
        parts = [self._settings.get(key) for key in ("host", "port", "dbname")]
        self._name = "postgresql " + " ".join(str(part) for part in parts if part)
        self._lock = threading.Lock()  # one connection, many threads
        self._open: Connection | None = None

    def __repr__(self) -> str:
        return f"PostgresStore({self._name!r})"

    @property
    def name(self) -> str:
        """Host, port and database."""
        return self._name

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        """See ``SqlStore``."""
        if not self._lock.acquire(timeout=self._busy_s):
            raise StoreUnavailable(self.name, f"it has been in use here for {self._busy_s:g} s")
        try:
            with self._translated():
                connection = self._connection()
                with self._watched(connection), connection.transaction():
                    yield _executor(connection)
        except BaseException:
            # whatever state it is in: the next call begins with a new one
            self._shut()
            raise
        finally:
            self._lock.release()

    def database_s(self, execute: Execute) -> float:
        """See ``SqlStore``."""
        rows = execute("SELECT extract(epoch FROM clock_timestamp())::double precision", ())
        return number(rows[0][0], 0.0, 1e15, "the time of the server")

    def close(self) -> None:
        """See ``Store``."""
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        connection, self._open = self._open, None
        if connection is not None:
            connection.close()

    def _connection(self) -> Connection:
        if self._open is not None and not self._open.closed:
            return self._open
        import psycopg

        connection: Connection = psycopg.connect(
            psycopg.conninfo.make_conninfo("", **self._settings), autocommit=True
        )
        self._open = connection
        with self._watched(connection), connection.transaction():
            execute = _executor(connection)
            execute("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))
            self.migrate(execute)
        return connection

    @contextmanager
    def _watched(self, connection: Connection) -> Iterator[None]:
        """Shut the socket of a server that does not even keep its own time-outs."""
        ours = socket.socket(fileno=os.dup(connection.fileno()))

        def shut() -> None:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)

        watchdog = threading.Timer(2 * self._busy_s, shut)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            ours.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import psycopg

        try:
            yield
        except (psycopg.errors.DataCorrupted, psycopg.errors.IndexCorrupted) as exc:
            raise DamagedState(f"canary store {self.name} is damaged") from exc
        except (psycopg.Error, OSError) as exc:
            # what libpq says may quote what it was given
            raise StoreUnavailable(self.name, self._without_password(str(exc))) from None

    def _without_password(self, text: str) -> str:
        first = " ".join(text.split())
        return first.replace(self._password, "***") if self._password else first


def _settings(dsn: str, busy_s: float) -> tuple[dict[str, str | int], str]:
    """Return what to connect with, bounds included, and the password for hiding it."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as exc:
        raise ConfigError(
            "PostgreSQL needs psycopg, which is not installed",
            key="canary.store.postgres",
            fix="pip install 'disagg-plugins[postgres]', or keep the canary in a file "
            "(canary.store.path)",
        ) from exc
    try:
        parsed = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        parsed = {}  # the error quotes the DSN
    given = {key: str(value) for key, value in parsed.items() if value is not None}
    if not given or _torn(given):
        raise ConfigError(
            "what it names is no DSN of PostgreSQL",
            key="canary.store.postgres",
            fix="write postgresql://user:password@host:5432/database; in the password write @ as "
            "%40 and / as %2F",
        )
    bound_ms = max(1, int(busy_s * 1000))
    options = f"-c statement_timeout={bound_ms} -c lock_timeout={bound_ms}"
    idle = f"-c idle_in_transaction_session_timeout={2 * bound_ms}"
    settings: dict[str, str | int] = {
        "application_name": "disagg canary",
        **given,
        "connect_timeout": max(LEAST_CONNECT_S, int(busy_s)),
        "tcp_user_timeout": bound_ms,
        "options": " ".join(filter(None, (given.get("options"), options, idle))),
    }
    return settings, given.get("password", "")


def _torn(given: Mapping[str, str]) -> bool:
    """Return whether a part of a password that was not escaped was read as something else.

    Host, port and database are told in errors.
    """
    ports = given.get("port", "").replace(",", "")
    told = given.get("host", "") + given.get("dbname", "")
    return "@" in told or not (ports == "" or (ports.isascii() and ports.isdigit()))


def _executor(connection: Connection) -> Execute:
    def execute(statement: LiteralString, values: Sequence[Value]) -> list[Row]:
        cursor = connection.execute(statement.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description is not None else []

    return execute
