"""A PostgreSQL of our own for tests: on a socket in a new folder, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_S = 60.0


def server_binaries() -> Path | None:
    """Return the folder of ``initdb`` and ``postgres``, or None where there is no server."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    # Debian keeps them out of PATH
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextmanager
def postgres_server(binaries: Path) -> Iterator[str]:
    """Run a server; the value is its DSN."""
    # the path of a socket has 107 characters at most, so not pytest's folder
    folder = Path(tempfile.mkdtemp(prefix="disagg-pg-"))
    user = _plain_user()
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        name = user.pw_name if user is not None else None
        data = folder / "data"
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "-N"],
            check=True,
            capture_output=True,
            cwd=folder,
            user=name,
            timeout=START_S,
        )
        small = ["-c", "shared_buffers=1MB", "-c", "max_connections=40", "-c", "listen_addresses="]
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", folder, "-F", *small],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            user=name,
        )
        try:
            dsn = f"host={folder} user=tests dbname=postgres"
            _wait_for(dsn, server)
            yield dsn
        finally:
            server.send_signal(signal.SIGINT)  # cuts its connections off
            server.wait(START_S)
    finally:
        shutil.rmtree(folder)


def _plain_user() -> pwd.struct_passwd | None:
    """Return whom to run it as where we are root, whom PostgreSQL refuses."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _wait_for(dsn: str, server: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > end_s:
                raise
            time.sleep(0.05)
