"""PostgreSQL as a memory: its password, its absence, servers that say nothing or go away."""

from __future__ import annotations

import socket
import sys
import threading

import psycopg
import pytest

from disagg_plugins.canary.postgres_store import PostgresStore
from disagg_plugins.canary.rollout import Instant, Plan, Rollout
from disagg_plugins.errors import ConfigError, StoreUnavailable

PASSWORD = "correct-horse-battery"
NOW = Instant(1_790_000_000.0, 0.0)
BEGUN, START = Rollout(Plan((1, 25, 100), bake_s=0.0)).start(NOW, "ann")


def test_without_psycopg_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'disagg-plugins\[postgres\]'"):
        PostgresStore("host=db")


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:5/{PASSWORD}@db/x",
        f"postgresql://u:{PASSWORD}/5@db/x",
        f"postgresql://u:5@{PASSWORD}@db/x",
        f"host db password {PASSWORD}",
        PASSWORD,
    ],
)
def test_a_dsn_that_is_none_is_an_error_that_does_not_quote_it(dsn):
    with pytest.raises(ConfigError, match="no DSN") as caught:
        PostgresStore(dsn)
    assert PASSWORD not in f"{caught.value!r} {caught.value} {caught.value.__cause__}"
    assert caught.value.__context__ is None


def test_the_password_shows_nowhere(free_port):
    store = PostgresStore(f"postgresql://u:{PASSWORD}@127.0.0.1:{free_port()}/x")
    assert store.name.startswith("postgresql 127.0.0.1")
    with pytest.raises(StoreUnavailable, match="refused") as caught:
        store.load()
    assert PASSWORD not in f"{store!r} {store.name} {caught.value!r} {caught.value}"


def test_a_server_that_quotes_the_password_is_not_repeated():
    store = PostgresStore(f"postgresql://u:{PASSWORD}@db/x")
    with pytest.raises(StoreUnavailable) as caught, store._translated():
        raise psycopg.OperationalError(f"what you sent: {PASSWORD}\n and more")
    assert str(caught.value) == "canary store postgresql db x: what you sent: *** and more"


def test_a_server_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        store = PostgresStore(f"host=127.0.0.1 port={port} user=u dbname=x", busy_s=0.5)
        with pytest.raises(StoreUnavailable, match="timeout"):
            store.load()


class Proxy:
    """Hands bytes on between a client and the server's socket, until it is told to fall silent."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.silent = threading.Event()
        self._sockets = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source, sink):
        try:
            while data := source.recv(65_536):
                if not self.silent.is_set():
                    sink.sendall(data)
        except OSError:
            return

    def close(self):
        self._listener.close()
        for each in self._sockets:
            each.close()


@pytest.fixture
def proxy(postgres_dsn):
    folder = psycopg.conninfo.conninfo_to_dict(postgres_dsn)["host"]
    proxy = Proxy(f"{folder}/.s.PGSQL.5432")
    yield proxy
    proxy.close()


def test_a_server_that_falls_silent_is_given_up_and_used_again_when_it_is_back(proxy):
    dsn = f"host=127.0.0.1 port={proxy.port} user=tests dbname=postgres sslmode=disable"
    store = PostgresStore(dsn, "silent", busy_s=0.5)
    store.commit(BEGUN.progress, [START], revision=0, lease=None)
    proxy.silent.set()
    with pytest.raises(StoreUnavailable):
        store.load()
    proxy.silent.clear()
    assert store.load().revision == 1
    store.close()


def test_a_connection_that_the_server_ended_is_made_anew(postgres_dsn):
    store = PostgresStore(postgres_dsn, "ended")
    store.load()
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'disagg canary'"
        )
    with pytest.raises(StoreUnavailable):
        store.load()
    assert store.load().revision == 0
    store.close()


def test_a_row_that_another_keeps_locked_is_an_error_after_the_bound(postgres_dsn):
    store = PostgresStore(postgres_dsn, "locked", busy_s=0.3)
    store.commit(BEGUN.progress, [START], revision=0, lease=None)
    with psycopg.connect(postgres_dsn) as other:
        other.execute(
            "SELECT 1 FROM disagg_canary_progress WHERE canary = 'locked' FOR UPDATE"
        ).fetchall()
        with pytest.raises(StoreUnavailable, match="timeout"):
            store.commit(BEGUN.progress, [], revision=1, lease=None)
    assert store.commit(BEGUN.progress, [], revision=1, lease=None) == 2
    store.close()


def test_the_lease_is_timed_by_the_server(postgres_dsn):
    store = PostgresStore(postgres_dsn, "timed")
    lease = store.lead("a", 60.0)
    assert lease is not None
    assert store.lead("b", 60.0) is None
    store.commit(BEGUN.progress, [START], revision=0, lease=lease)
    store.close()


def test_many_processes_may_make_the_tables_at_once(postgres_dsn):
    with psycopg.connect(postgres_dsn, autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS fresh")
        admin.execute("CREATE DATABASE fresh")
    stores = [
        PostgresStore(postgres_dsn.replace("dbname=postgres", "dbname=fresh")) for _ in range(4)
    ]
    found = []
    barrier = threading.Barrier(len(stores))

    def use(store):
        barrier.wait(10)
        found.append(store.load().revision)

    threads = [threading.Thread(target=use, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for store in stores:
        store.close()
    assert found == [0] * len(stores)
