from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from disagg_plugins.launch.guard import CANNOT_START, parse_cpus

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a subreaper is needed to see orphans: Linux only"
)

GUARD = [sys.executable, "-m", "disagg_plugins.launch.guard", "--grace-s", "0.5"]

DEAF_TREE = """
import signal, subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""  # noqa: E501


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {within_s} s"
        time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    """Whether a process is gone; a zombie that nobody reaps counts as gone."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def guarded(*program: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*GUARD, *options, "--", *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_exit_code_of_the_program_is_passed_on() -> None:
    with guarded(sys.executable, "-c", "raise SystemExit(7)") as guard:
        assert guard.wait(10) == 7


def test_death_by_signal_is_told_as_shells_do() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with guarded(sys.executable, "-c", program) as guard:
        assert guard.wait(10) == 128 + signal.SIGKILL


def test_program_that_is_not_there_is_an_error_in_words() -> None:
    with guarded("/nonexistent/engine") as guard:
        assert guard.wait(10) == CANNOT_START
        assert guard.stderr is not None
        errors = guard.stderr.read()
    assert errors == b"cannot start /nonexistent/engine: No such file or directory\n"


@pytest.mark.parametrize("how", ["sigterm", "launcher gone"])
def test_deaf_grandchild_in_its_own_session_is_killed(how: str) -> None:
    with guarded(sys.executable, "-c", DEAF_TREE) as guard:
        assert guard.stdout is not None
        assert guard.stdin is not None
        grandchild = psutil.Process(int(guard.stdout.readline()))
        assert grandchild.is_running()
        if how == "sigterm":
            guard.send_signal(signal.SIGTERM)
        else:
            guard.stdin.close()
        assert guard.wait(10) == 128 + signal.SIGTERM
        assert ended(grandchild)


def test_what_a_program_orphans_ends_with_it() -> None:
    orphan = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    with guarded(sys.executable, "-c", orphan) as guard:
        assert guard.stdout is not None
        pid = int(guard.stdout.readline())
        assert guard.wait(10) == 0
        assert not psutil.pid_exists(pid)


def test_launcher_killed_with_sigkill_takes_the_tree_along() -> None:
    launcher = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen({GUARD!r} + ['--', 'sleep', '600'], stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        guard = psutil.Process(int(process.stdout.readline()))
        wait_until(lambda: bool(guard.children()), "the guarded program")
        tree = [guard, *guard.children(recursive=True)]
        process.kill()
        wait_until(lambda: all(ended(p) for p in tree), "the end of the tree")


def test_program_runs_on_the_given_cpus_only() -> None:
    cpu = min(os.sched_getaffinity(0))
    program = "import os; print(os.sched_getaffinity(0))"
    options = ("--cpus", str(cpu))
    with guarded(sys.executable, "-c", program, options=options) as guard:
        assert guard.wait(10) == 0
        assert guard.stdout is not None
        assert guard.stdout.read().decode() == f"{{{cpu}}}\n"


def test_cpu_that_is_not_there_is_an_error_in_words() -> None:
    done = subprocess.run(
        [*GUARD, "--cpus", "9999", "--", "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == CANNOT_START
    assert "cannot run on CPUs [9999]" in done.stderr


def test_cpus_are_parsed() -> None:
    assert parse_cpus("0, 3,") == {0, 3}
    assert parse_cpus("") == set()
