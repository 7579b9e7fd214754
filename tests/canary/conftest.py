"""Stores for the tests of the canary's memory, and two arms behind a gateway."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from disagg_plugins.canary.postgres_store import PostgresStore
from disagg_plugins.canary.sqlite_store import SqliteStore
from tests.canary.postgres_server import postgres_server, server_binaries
from tests.canary.side_by_side import SideBySide, build_side_by_side
from tests.gateway.harness import SECRET

NUMBERS = itertools.count()


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self) -> None:
        self.now_s = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """A server of our own, one a test process."""
    binaries = server_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian, Ubuntu: apt install postgresql)")
    with postgres_server(binaries) as dsn:
        yield dsn


Opener = Callable[..., SqliteStore | PostgresStore]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Opener]:
    """Return a function that opens the same memory again and again."""
    canary = f"test-{next(NUMBERS)}"
    dsn = request.getfixturevalue("postgres_dsn") if request.param == "postgres" else ""
    opened: list[SqliteStore | PostgresStore] = []

    def make(name: str = canary) -> SqliteStore | PostgresStore:
        store: SqliteStore | PostgresStore
        if dsn:
            store = PostgresStore(dsn, name, clock=clock, busy_s=10.0)
        else:
            store = SqliteStore(tmp_path / "canary.sqlite", name, clock=clock, busy_s=10.0)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SideBySide]]:
    """Return what builds two arms; ``side_by_side`` says how."""
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    with ExitStack() as stack:
        yield partial(build_side_by_side, stack, tmp_path)
