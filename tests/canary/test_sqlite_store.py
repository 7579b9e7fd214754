"""The file in which a rollout is remembered: killed writers, damage, locks, full disks, modes."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_plugins.canary.rollout import Instant, Plan, Rollout
from disagg_plugins.canary.sqlite_store import SqliteStore
from disagg_plugins.errors import ConfigError, DamagedState, StoreUnavailable

ROOT = Path(__file__).resolve().parents[2]
NOW = Instant(1_790_000_000.0, 0.0)
BEGUN, START = Rollout(Plan((1, 25, 100), bake_s=0.0)).start(NOW, "ann")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "canary.sqlite"


@pytest.fixture
def store(path):
    store = SqliteStore(path, busy_s=0.2)
    yield store
    store.close()


def begin(store):
    store.commit(BEGUN.progress, [START], revision=0, lease=None)


def test_nothing_is_made_before_the_first_use(store, path):
    assert not path.exists()
    store.load()
    assert path.exists()


def test_the_file_and_those_beside_it_are_for_their_owner_alone(store, path):
    before = os.umask(0)
    try:
        begin(store)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    assert set(modes) == {"canary.sqlite", "canary.sqlite-wal", "canary.sqlite-shm"}
    assert set(modes.values()) == {0o600}


def test_a_file_that_others_may_read_is_refused_with_the_fix(store, path):
    path.touch()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        store.load()


def test_it_is_written_ahead_and_fully_synchronous(store):
    with store.transaction() as execute:
        assert execute("PRAGMA journal_mode", ()) == [("wal",)]
        assert execute("PRAGMA synchronous", ()) == [(2,)]


WRITER = """
import sys
from pathlib import Path
from disagg_plugins.canary.guardrails import Judgement
from disagg_plugins.canary.rollout import Instant, Plan, Rollout
from disagg_plugins.canary.sqlite_store import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
now = Instant(1_790_000_000.0, 0.0)
rollout, decision = Rollout(Plan(tuple(range(1, 101)), bake_s=0.0)).start(now, "ann")
good = Judgement("promote", ("x" * 900,), ())
revision = 0
while decision is not None:
    progress = rollout.progress
    revision = store.commit(progress, [decision], revision=revision, lease=None)
    print(revision, progress.step, flush=True)
    rollout, decision = rollout.tick(now, good)
"""


@pytest.mark.parametrize("writes", [1, 7, 40])
def test_a_killed_process_comes_back_at_the_same_step(path, writes):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert writer.stdout is not None
    told = []
    try:
        told += [writer.stdout.readline() for _ in range(writes)]
    finally:
        writer.send_signal(signal.SIGKILL)
        with writer.stdout:  # not communicate(): it passes over what readline() has read ahead
            told += writer.stdout.readlines()
        writer.wait(30)
    revision, step = map(int, [line for line in told if line.endswith("\n")][-1].split())
    again = SqliteStore(path)
    found = again.load()
    # the write after the last that was told is there as a whole or not at all
    extra = found.revision - revision
    assert extra in (0, 1)
    assert found.progress.step in (step + extra, 99)  # the last one completes at its step
    assert found.progress.weight == found.progress.step + 1
    decisions = again.decisions(most=1_000)
    assert [d.number for d in decisions] == list(range(found.progress.decisions, 0, -1))
    assert decisions[0].to_weight == found.progress.weight
    again.close()


def test_a_process_killed_within_a_transaction_leaves_no_trace(store, path):
    begin(store)
    code = """
import os, signal, sys
from pathlib import Path
from disagg_plugins.canary.sqlite_store import SqliteStore
with SqliteStore(Path(sys.argv[1])).transaction() as execute:
    execute("UPDATE disagg_canary_progress SET revision = 99", ())
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.load().revision == 1


def test_a_locked_file_is_an_error_after_the_bound_and_works_again_later(store, path):
    begin(store)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match=r"locked for 0\.2 s") as caught:
        store.load()
    assert caught.value.retryable
    other.execute("ROLLBACK")
    other.close()
    assert store.load().revision == 1


def test_a_first_use_waits_for_another_process_that_has_the_new_file_locked(path):
    path.touch(0o600)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")  # so it cannot be switched to WAL yet
    store = SqliteStore(path, busy_s=10.0)
    tried = threading.Event()
    into_wal = store._into_wal

    def watched(connection):
        tried.set()
        into_wal(connection)

    store._into_wal = watched
    found = []
    thread = threading.Thread(target=lambda: found.append(store.lead("a", 10.0)))
    thread.start()
    assert tried.wait(10.0)
    other.execute("COMMIT")
    other.close()
    thread.join(10.0)
    store.close()
    assert found
    assert found[0] is not None


def test_a_thread_that_keeps_it_is_an_error_for_others_after_the_bound(store):
    begin(store)
    inside, done = threading.Event(), threading.Event()

    def keep():
        with store.transaction():
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(StoreUnavailable, match="in use here"):
            store.load()
    finally:
        done.set()
        thread.join(30)
    assert store.load().revision == 1


def test_a_full_file_is_an_error_and_keeps_what_it_had(path):
    store = SqliteStore(path, most_bytes=200_000)
    begin(store)
    epoch = BEGUN.progress.epoch
    with pytest.raises(StoreUnavailable, match="full"):
        store.contribute(epoch, "a", "w", {"n": "x" * 300_000})
    assert store.load().revision == 1
    store.contribute(epoch, "a", "w", {"n": 1})
    assert store.evidence(epoch) == {"a": {"n": 1}}
    store.close()


@pytest.mark.parametrize("content", [b"no database at all, whatever else it may be" * 100])
def test_what_is_no_database_is_damaged(store, path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(DamagedState, match="damaged"):
        store.load()
    assert path.read_bytes() == content


def test_a_database_whose_pages_were_overwritten_is_damaged(store, path):
    begin(store)
    store.contribute(BEGUN.progress.epoch, "a", "w", {"n": "x" * 100_000})
    store.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(DamagedState):
        store.load()


def test_a_file_that_was_cut_off_is_damaged(store, path):
    begin(store)
    store.close()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DamagedState):
        store.load()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(StoreUnavailable, match="No such file"):
        SqliteStore(tmp_path / "no" / "canary.sqlite").load()


def test_a_folder_in_its_place_is_an_error(path, store):
    path.mkdir()
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        store.load()


def test_a_file_that_was_moved_away_is_not_written_on(store, path):
    begin(store)
    path.rename(path.with_suffix(".old"))
    for beside in ("-wal", "-shm"):
        path.with_name(path.name + beside).unlink(missing_ok=True)
    assert store.load().revision == 0


def test_an_error_inside_leaves_no_transaction_open(store, path):
    begin(store)

    def fail_inside():
        with store.transaction() as execute:
            execute("UPDATE disagg_canary_progress SET revision = 99", ())
            raise RuntimeError("of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        fail_inside()
    other = SqliteStore(path)
    assert other.load().revision == 1
    seen = replace(BEGUN.progress, baked_s=1.0)
    assert other.commit(seen, [], revision=1, lease=None) == 2
    other.close()
