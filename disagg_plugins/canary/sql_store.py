"""What SQLite and PostgreSQL have in common: tables, statements, transactions.

One database may keep several canaries, each under its own name. All statements are written in what
both understand; a subclass brings the connection, the bound on time, and the words for errors.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from disagg_plugins.canary.progress import Decision, Epoch, Progress
from disagg_plugins.canary.state import integer, number
from disagg_plugins.canary.store import (
    MOST_DECISIONS,
    MOST_GATEWAYS,
    MOST_STATE_BYTES,
    Lease,
    Stored,
)
from disagg_plugins.errors import DamagedState, StoreConflict

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import LiteralString

Value = str | int | float
Row = tuple[object, ...]
Execute = Callable[["LiteralString", Sequence[Value]], list[Row]]
"""Runs a statement with ``?`` for its values, and returns its rows."""

TABLES = (
    """CREATE TABLE disagg_canary_progress (
        canary TEXT PRIMARY KEY, revision BIGINT NOT NULL, progress TEXT NOT NULL)""",
    """CREATE TABLE disagg_canary_lease (
        canary TEXT PRIMARY KEY, fence BIGINT NOT NULL, gateway TEXT NOT NULL,
        ends_s DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE disagg_canary_evidence (
        canary TEXT NOT NULL, rollout BIGINT NOT NULL, step BIGINT NOT NULL, gateway TEXT NOT NULL,
        writer TEXT NOT NULL, evidence TEXT NOT NULL,
        PRIMARY KEY (canary, rollout, step, gateway))""",
    """CREATE TABLE disagg_canary_log (
        canary TEXT NOT NULL, number BIGINT NOT NULL, decision TEXT NOT NULL,
        PRIMARY KEY (canary, number))""",
)

VERSION = 1
"""Of the tables."""


class SqlStore(ABC):
    """A store in an SQL database; see ``store.Store``.

    Args:
        canary: The name of the canary in this database.
        clock: Seconds, for the lease; None: the database's own.
    """

    MIGRATIONS: tuple[tuple[LiteralString, ...], ...]
    """The statements that lead from version n to n + 1."""

    LOCKED: LiteralString = ""
    """What keeps a row that was read as it is until the end of the transaction."""

    def __init__(self, canary: str, clock: Callable[[], float] | None) -> None:
        self._canary = canary
        self._clock = clock

    @property
    @abstractmethod
    def name(self) -> str:
        """See ``Store``."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Execute]:
        """Do everything inside or nothing; errors of the database come out translated."""

    @abstractmethod
    def database_s(self, execute: Execute) -> float:
        """Return the time of the database's own clock, in seconds."""

    def migrate(self, execute: Execute) -> None:
        """Bring the tables to this version; inside a transaction that shuts all others out.

        Raises:
            DamagedState: The version cannot be.
            StoreConflict: It is a later one.
        """
        execute(
            "CREATE TABLE IF NOT EXISTS disagg_canary_schema (version BIGINT NOT NULL)",
            (),
        )
        rows = execute("SELECT version FROM disagg_canary_schema", ())
        if len(rows) > 1:
            raise DamagedState("the tables have several versions")
        version = integer(rows[0][0], 1, None, "the version of the tables") if rows else 0
        if version > VERSION:
            raise StoreConflict(
                self.name,
                f"its tables have version {version}, and this program knows {VERSION} at most: "
                "upgrade it",
            )
        for statements in self.MIGRATIONS[version:]:
            for statement in statements:
                execute(statement, ())
        if not rows:
            execute("INSERT INTO disagg_canary_schema (version) VALUES (?)", (VERSION,))
        elif version < VERSION:
            execute("UPDATE disagg_canary_schema SET version = ?", (VERSION,))

    def load(self) -> Stored:
        """See ``Store``."""
        with self.transaction() as execute:
            return self._load(execute, "")

    def _load(self, execute: Execute, locked: LiteralString) -> Stored:
        rows = execute(
            "SELECT revision, progress FROM disagg_canary_progress WHERE canary = ?" + locked,
            (self._canary,),
        )
        if not rows:
            return Stored(Progress(), 0)
        revision, progress = rows[0]
        found = Progress.from_dict(_plain(progress))
        return Stored(found, integer(revision, 0, None, "the revision"))

    def lead(self, gateway: str, lease_s: float) -> Lease | None:
        """See ``Store``."""
        with self.transaction() as execute:
            now_s = self._now_s(execute)
            execute(
                "INSERT INTO disagg_canary_lease (canary, fence, gateway, ends_s) "
                "VALUES (?, 0, '', 0) ON CONFLICT (canary) DO NOTHING",
                (self._canary,),
            )
            fence, holder, left_s = self._lease(execute, now_s)
            # a lease that ends later than it can have been given: the clock went back
            free = not holder or not 0.0 < left_s <= lease_s
            if holder != gateway and not free:
                return None
            if holder != gateway:
                fence += 1
            execute(
                "UPDATE disagg_canary_lease SET fence = ?, gateway = ?, ends_s = ? "
                "WHERE canary = ?",
                (fence, gateway, now_s + lease_s, self._canary),
            )
            return Lease(gateway, fence, lease_s)

    def _lease(self, execute: Execute, now_s: float) -> tuple[int, str, float]:
        """Return fence, holder (empty: none) and the seconds left; the row stays locked."""
        rows = execute(
            "SELECT fence, gateway, ends_s FROM disagg_canary_lease WHERE canary = ?" + self.LOCKED,
            (self._canary,),
        )
        if not rows:
            return 0, "", 0.0
        fence, holder, ends_s = rows[0]
        if not isinstance(holder, str):
            raise DamagedState("the holder of the lease is no name")
        ends_s = number(ends_s, 0.0, 1e15, "the end of the lease")
        return integer(fence, 0, None, "the fence"), holder, ends_s - now_s

    def resign(self, lease: Lease) -> None:
        """See ``Store``."""
        with self.transaction() as execute:
            execute(
                "UPDATE disagg_canary_lease SET gateway = '', ends_s = 0 "
                "WHERE canary = ? AND fence = ? AND gateway = ?",
                (self._canary, lease.fence, lease.gateway),
            )

    def commit(
        self,
        progress: Progress,
        decisions: Sequence[Decision],
        *,
        revision: int,
        lease: Lease | None,
    ) -> int:
        """See ``Store``."""
        canary = self._canary
        with self.transaction() as execute:
            if lease is not None:
                self._check(execute, lease)
            execute(
                "INSERT INTO disagg_canary_progress (canary, revision, progress) VALUES (?, 0, ?) "
                "ON CONFLICT (canary) DO NOTHING",
                (canary, json.dumps(Progress().as_dict())),
            )
            stored = self._load(execute, self.LOCKED)
            if stored.revision != revision:
                raise StoreConflict(
                    self.name, f"it is at revision {stored.revision}, not {revision}"
                )
            first = stored.progress.decisions + 1
            numbers = [decision.number for decision in decisions]
            if numbers != list(range(first, progress.decisions + 1)):
                raise StoreConflict(
                    self.name,
                    f"decisions {numbers} do not follow on {first - 1} up to {progress.decisions}",
                )
            execute(
                "UPDATE disagg_canary_progress SET revision = ?, progress = ? WHERE canary = ?",
                (revision + 1, json.dumps(progress.as_dict()), canary),
            )
            for decision in decisions:
                execute(
                    "INSERT INTO disagg_canary_log (canary, number, decision) VALUES (?, ?, ?)",
                    (canary, decision.number, json.dumps(decision.as_dict())),
                )
            if progress.epoch != stored.progress.epoch:
                execute(
                    "DELETE FROM disagg_canary_evidence "
                    "WHERE canary = ? AND NOT (rollout = ? AND step = ?)",
                    (canary, progress.rollout, progress.step),
                )
            return revision + 1

    def _check(self, execute: Execute, lease: Lease) -> None:
        fence, holder, left_s = self._lease(execute, self._now_s(execute))
        if (fence, holder) != (lease.fence, lease.gateway):
            raise StoreConflict(self.name, f"the lease {lease.fence} of {lease.gateway} is over")
        if left_s <= 0.0:
            raise StoreConflict(
                self.name, f"the lease of {lease.gateway} ended {-left_s:.1f} s ago"
            )

    def adopt(self, epoch: Epoch, gateway: str, writer: str) -> Mapping[str, object] | None:
        """See ``Store``."""
        key = (self._canary, epoch.rollout, epoch.step, gateway)
        with self.transaction() as execute:
            rows = execute(
                "UPDATE disagg_canary_evidence SET writer = ? "
                "WHERE canary = ? AND rollout = ? AND step = ? AND gateway = ? RETURNING evidence",
                (writer, *key),
            )
            return _plain(rows[0][0]) if rows else None

    def contribute(
        self, epoch: Epoch, gateway: str, writer: str, evidence: Mapping[str, object]
    ) -> None:
        """See ``Store``."""
        text = json.dumps(evidence, separators=(",", ":"))
        if len(text) > MOST_STATE_BYTES:
            raise StoreConflict(
                self.name, f"evidence of {len(text)} bytes is more than {MOST_STATE_BYTES}"
            )
        with self.transaction() as execute:
            # locked, so that no epoch ends between the look at it and the write
            now = self._load(execute, self.LOCKED).progress.epoch
            if now != epoch:
                raise StoreConflict(self.name, f"the evidence is of {epoch}, and now is {now}")
            found = execute(
                "INSERT INTO disagg_canary_evidence "
                "(canary, rollout, step, gateway, writer, evidence) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (canary, rollout, step, gateway) "
                "DO UPDATE SET evidence = excluded.evidence "
                "WHERE disagg_canary_evidence.writer = excluded.writer RETURNING gateway",
                (self._canary, epoch.rollout, epoch.step, gateway, writer, text),
            )
            if not found:
                raise StoreConflict(
                    self.name,
                    f"another process writes evidence as gateway {gateway}: names must be unique",
                )
            rows = execute(
                "SELECT count(*) FROM disagg_canary_evidence "
                "WHERE canary = ? AND rollout = ? AND step = ?",
                (self._canary, epoch.rollout, epoch.step),
            )
            if rows[0][0] not in range(MOST_GATEWAYS + 1):
                raise StoreConflict(self.name, f"more than {MOST_GATEWAYS} gateways take part")

    def evidence(self, epoch: Epoch) -> Mapping[str, Mapping[str, object]]:
        """See ``Store``."""
        with self.transaction() as execute:
            rows = execute(
                "SELECT gateway, evidence FROM disagg_canary_evidence "
                "WHERE canary = ? AND rollout = ? AND step = ? ORDER BY gateway LIMIT ?",
                (self._canary, epoch.rollout, epoch.step, MOST_GATEWAYS),
            )
        return {str(gateway): _plain(evidence) for gateway, evidence in rows}

    def decisions(self, *, before: int | None = None, most: int = 100) -> Sequence[Decision]:
        """See ``Store``."""
        below = before if before is not None else 1 << 53
        with self.transaction() as execute:
            rows = execute(
                "SELECT decision FROM disagg_canary_log WHERE canary = ? AND number < ? "
                "ORDER BY number DESC LIMIT ?",
                (self._canary, below, max(0, min(most, MOST_DECISIONS))),
            )
        return [Decision.from_dict(_plain(row[0])) for row in rows]

    @abstractmethod
    def close(self) -> None:
        """See ``Store``."""

    def _now_s(self, execute: Execute) -> float:
        return self._clock() if self._clock is not None else self.database_s(execute)


def _plain(text: object) -> Mapping[str, object]:
    """Return a stored mapping.

    Raises:
        DamagedState: It is none.
    """
    if not isinstance(text, str) or len(text) > MOST_STATE_BYTES:
        raise DamagedState("a stored state is no text, or too long")
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedState("a stored state is no JSON") from None
    if not isinstance(found, dict):
        raise DamagedState("a stored state is no mapping")
    return found
