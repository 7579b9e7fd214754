"""Running the workers of a policy as processes of this machine.

Every worker is started under a guard (``guard.py``) that ends its whole tree of processes with
it, or with this process. What a worker prints goes to ``<run dir>/<name>.log``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import psutil

from disagg_plugins.errors import ConfigError, DisaggError
from disagg_plugins.launch.guard import KILL_S

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.launch.interfaces import Launcher
    from disagg_plugins.policy import Launch, Policy, WorkerPolicy

Say = Callable[[str], None]

HEALTH_CONNECT_S = 2.0
"""One look at ``/health``; the whole wait is ``launch.start_s``."""

LOOK_EVERY_S = 0.25
PROGRESS_EVERY_S = 5.0
TAIL_LINES = 15


class WorkerFailed(DisaggError):
    """A worker ended, or did not become healthy in time; carries the end of its log."""

    def __init__(self, worker: str, problem: str, log: Path, tail: list[str]) -> None:
        super().__init__(worker, problem)
        self.worker = worker
        self.problem = problem
        self.log = log
        self.tail = tail

    def __str__(self) -> str:
        lines = "".join(f"\n  | {line}" for line in self.tail) or " (it is empty)"
        return f"worker {self.worker} {self.problem}; the end of {self.log}:{lines}"


def tail_of(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a log that are not blank, read from at most its last 64 KiB."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - (1 << 16)))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip()[:400] for line in text.splitlines() if line.strip()][-lines:]


def listener(port: int) -> psutil.Process | None:
    """Return the process that listens on a TCP port, if this user may know it."""
    try:
        for found in psutil.net_connections("tcp"):
            listens = found.status == psutil.CONN_LISTEN and tuple(found.laddr[1:]) == (port,)
            if listens and found.pid:
                return psutil.Process(found.pid)
    except psutil.Error:
        return None
    return None


def _port_in_use(worker: WorkerPolicy, holder: psutil.Process | None) -> ConfigError:
    by = f" by process {holder.pid} ({holder.name()})" if holder is not None else ""
    parts = urlsplit(worker.url)
    return ConfigError(
        f"worker {worker.name}: {parts.hostname}:{parts.port} is in use{by}",
        key=f"fleet.workers.{worker.name}.url",
        fix="end that process, or give the worker another port",
    )


def check_port_free(worker: WorkerPolicy) -> None:
    """Raise ConfigError if something listens where ``worker`` is to listen."""
    parts = urlsplit(worker.url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 0
    try:
        with socket.create_connection((host, port), timeout=HEALTH_CONNECT_S):
            pass
    except OSError:
        return
    raise _port_in_use(worker, listener(port))


def healthy(url: str) -> bool:
    """Return whether ``GET /health`` of a worker answers 200 within ``HEALTH_CONNECT_S``."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=HEALTH_CONNECT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


@dataclass(slots=True)
class RunningWorker:
    """One started worker.

    Attributes:
        policy: What the policy says of it.
        launch: Its launch section.
        guard: The guard's process; its standard input is the line that keeps the worker alive.
        log: Where the worker's output goes.
        started_s: Monotonic time of the start.
    """

    policy: WorkerPolicy
    launch: Launch
    guard: subprocess.Popen[bytes]
    log: Path
    started_s: float

    def check_is_listener(self) -> None:
        """Raise ConfigError if the port was taken by a process that is not this worker's.

        A program that took the port while the worker was starting may well answer ``/health``.
        """
        holder = listener(urlsplit(self.policy.url).port or 0)
        try:
            foreign = holder is not None and self.guard.pid not in [
                holder.pid,
                *(p.pid for p in holder.parents()),
            ]
            if foreign:
                raise _port_in_use(self.policy, holder)
        except psutil.NoSuchProcess:
            return

    def failure(self, problem: str) -> WorkerFailed:
        """Return the error that tells of this worker, with the end of its log."""
        return WorkerFailed(self.policy.name, problem, self.log, tail_of(self.log))


class LocalFleet:
    """The workers of a policy that have a ``launch`` section; use it in a ``with`` statement.

    Args:
        policy: The policy.
        policy_path: Absolute path of its file.
        launchers: Engine name to launcher.
        run_dir: Where logs go; made if it is not there.
        say: Takes one line of progress.
    """

    def __init__(
        self,
        policy: Policy,
        policy_path: Path,
        launchers: Mapping[str, Launcher],
        *,
        run_dir: Path,
        say: Say,
    ) -> None:
        self.policy = policy
        self.policy_path = policy_path
        self.launchers = launchers
        self.run_dir = run_dir
        self.say = say
        self.workers: list[RunningWorker] = []
        self._watching: threading.Thread | None = None
        self._stop_watching = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start every worker and wait until all are healthy.

        Raises:
            ConfigError: A port is in use, an engine has no launcher, an interpreter is missing.
            WorkerFailed: A worker ended or was not healthy within its ``launch.start_s``.
        """
        planned = list(self._plan())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for worker, launch, argv, env in planned:
            self.workers.append(self._spawn(worker, launch, argv, env))
            self.say(f"started {worker.name} ({worker.engine}, {worker.role.value}): {worker.url}")
        self._wait_healthy()

    def watch(self) -> None:
        """Say it, from a thread, when a worker ends by itself; until ``stop``."""
        self._watching = threading.Thread(target=self._watch, name="fleet-watch", daemon=True)
        self._watching.start()

    def stop(self) -> None:
        """End every worker with all its processes; idempotent.

        Waits at most the longest ``launch.stop_s`` and a few seconds for SIGKILL.
        """
        self._stop_watching.set()
        if self._watching is not None:
            self._watching.join()
            self._watching = None
        running = [w for w in self.workers if w.guard.poll() is None]
        if running:
            self.say(f"stopping {', '.join(w.policy.name for w in running)}")
        for worker in self.workers:
            if worker.guard.stdin is not None:
                worker.guard.stdin.close()
        for worker in self.workers:
            try:
                worker.guard.wait(worker.launch.stop_s + KILL_S + 5)
            except subprocess.TimeoutExpired:
                self.say(f"the guard of {worker.policy.name} does not end: killing it")
                worker.guard.kill()
                worker.guard.wait()
        self.workers.clear()

    def _plan(self) -> Iterator[tuple[WorkerPolicy, Launch, list[str], dict[str, str]]]:
        for worker in self.policy.fleet.workers:
            if worker.launch is None:
                continue
            launcher = self.launchers.get(worker.engine)
            if launcher is None:
                known = ", ".join(sorted(self.launchers)) or "none"
                raise ConfigError(
                    f"no plugin can start the engine {worker.engine!r} (known: {known})",
                    key=f"fleet.workers.{worker.name}.engine",
                    fix="install its adapter, or start the worker yourself and drop `launch`",
                )
            check_port_free(worker)
            command = launcher.command(worker, self.policy, self.policy_path)
            yield worker, worker.launch, list(command.argv), {**os.environ, **command.env}

    def _spawn(
        self, worker: WorkerPolicy, launch: Launch, argv: list[str], env: dict[str, str]
    ) -> RunningWorker:
        log_path = self.run_dir / f"{worker.name}.log"
        guard = [sys.executable, "-m", "disagg_plugins.launch.guard"]
        guard += ["--grace-s", f"{launch.stop_s:g}"]
        if launch.cpus:
            guard += ["--cpus", ",".join(map(str, launch.cpus))]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*guard, "--", *argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                # Ctrl-C reaches this process alone, which then ends its workers in order.
                start_new_session=True,
            )
        return RunningWorker(worker, launch, process, log_path, time.monotonic())

    def _wait_healthy(self) -> None:
        waiting = list(self.workers)
        next_word_s = time.monotonic() + PROGRESS_EVERY_S
        while waiting:
            for worker in self.workers:
                self._check_running(worker)
            for worker in list(waiting):
                if healthy(worker.policy.url):
                    worker.check_is_listener()
                    waiting.remove(worker)
                    took_s = time.monotonic() - worker.started_s
                    self.say(f"{worker.policy.name} is healthy after {took_s:.0f} s")
                else:
                    self._check_in_time(worker)
            if waiting and time.monotonic() >= next_word_s:
                next_word_s = time.monotonic() + PROGRESS_EVERY_S
                self._say_waiting(waiting)
            if waiting:
                time.sleep(LOOK_EVERY_S)

    def _check_running(self, worker: RunningWorker) -> None:
        code = worker.guard.poll()
        if code is not None:
            raise worker.failure(f"ended with code {code} while the fleet was starting")

    def _check_in_time(self, worker: RunningWorker) -> None:
        if time.monotonic() - worker.started_s > worker.launch.start_s:
            raise worker.failure(
                f"was not healthy within {worker.launch.start_s:g} s (policy key launch.start_s)"
            )

    def _say_waiting(self, waiting: list[RunningWorker]) -> None:
        names = ", ".join(w.policy.name for w in waiting)
        longest_s = time.monotonic() - min(w.started_s for w in waiting)
        last = tail_of(waiting[0].log, 1)
        word = f"; {waiting[0].policy.name} says: {last[0][:120]}" if last else ""
        self.say(f"waiting for {names} to be healthy ({longest_s:.0f} s){word}")

    def _watch(self) -> None:
        ended: set[str] = set()
        while not self._stop_watching.wait(LOOK_EVERY_S * 4):
            for worker in self.workers:
                code = worker.guard.poll()
                if code is not None and worker.policy.name not in ended:
                    ended.add(worker.policy.name)
                    self.say(str(worker.failure(f"ended with code {code}")))
