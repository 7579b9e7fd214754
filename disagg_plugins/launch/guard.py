"""The small process that stands over each launched worker and leaves nothing behind.

``python -m disagg_plugins.launch.guard [--cpus 0,1] [--grace-s 20] -- PROGRAM ARGUMENT...``

An engine server is a tree of processes; some of them move to sessions of their own, and a server
that is told to end while its engine core is still starting can leave that core running. So a
guard starts the server and

- adopts what the tree orphans (Linux: child subreaper), so no descendant escapes its sight;
- ends the whole tree when it is told to (SIGTERM, SIGINT), when the server itself ends, or when
  its own standard input closes. The launcher holds the other end of that pipe, so the tree ends
  with the launcher even if the launcher is killed with SIGKILL;
- exits with the server's code (128 + signal number if a signal ended it).

The order of an end: SIGTERM to the server's process group, at most ``grace_s`` seconds, then
SIGKILL to every descendant until none is left.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
"""Both from linux/prctl.h."""

KILL_S = 5.0
"""How long to insist with SIGKILL: only a process stuck in the kernel outlives it."""

CANNOT_START = 127
"""The exit code of a shell whose command was not found."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class Guard:
    """Runs one server and ends its whole tree of processes.

    Args:
        argv: The server.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, argv: list[str], *, grace_s: float) -> None:
        self.argv = argv
        self.grace_s = grace_s
        self.server: subprocess.Popen[bytes] | None = None
        self.exit_code: int | None = None

    def run(self) -> int:
        """Run the server until it ends or has to; return the exit code to pass on."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        told: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda n, _frame: told.append(n))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            self.server = self._start()
        except OSError as problem:
            print(f"cannot start {self.argv[0]}: {problem.strerror or problem}", file=sys.stderr)
            return CANNOT_START
        launcher_gone = False
        while self.exit_code is None and not told and not launcher_gone:
            ready, _, _ = select.select([0, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
            # Nothing is ever written to standard input: readable means closed.
            launcher_gone = 0 in ready and not os.read(0, 1)
            self._reap()
        self._end_tree()
        return self.exit_code if self.exit_code is not None else 128 + signal.SIGKILL

    def _start(self) -> subprocess.Popen[bytes]:
        # This process has one thread, so code between fork and exec is safe.
        return subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def _reap(self) -> None:
        """Collect every ended child, adopted ones included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.server is not None and pid == self.server.pid:
                code = os.waitstatus_to_exitcode(status)
                self.server.returncode = code
                self.exit_code = code if code >= 0 else 128 - code

    def _end_tree(self) -> None:
        """End every descendant; return when none is left or ``KILL_S`` after SIGKILL."""
        with suppress(ProcessLookupError, PermissionError):
            if self.server is not None:
                os.killpg(self.server.pid, signal.SIGTERM)
        if self._gone_within(self.grace_s):
            return
        deadline = time.monotonic() + KILL_S
        while time.monotonic() < deadline:
            for process in self._descendants():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if self._gone_within(0.1):
                return
        left = ", ".join(f"{p.pid}" for p in self._descendants())
        print(f"processes that outlived SIGKILL: {left}", file=sys.stderr)

    def _gone_within(self, wait_s: float) -> bool:
        deadline = time.monotonic() + wait_s
        while True:
            self._reap()
            if not self._descendants():
                return True
            if time.monotonic() >= deadline:
                return False
            if self.exit_code is not None and deadline - time.monotonic() > 1:
                # The server has ended: what it left behind gets a second, not the whole grace.
                deadline = time.monotonic() + 1
            time.sleep(0.05)

    def _descendants(self) -> list[psutil.Process]:
        return psutil.Process().children(recursive=True)


def parse_cpus(text: str) -> set[int]:
    """Return the CPUs of a comma-separated list; an empty text gives an empty set."""
    return {int(part) for part in text.split(",") if part.strip()}


def main(argv: list[str] | None = None) -> int:
    """Stand over the program named after ``--``."""
    parser = argparse.ArgumentParser(prog="disagg_plugins.launch.guard")
    parser.add_argument("--cpus", type=parse_cpus, default=set(), help="run on these CPUs only")
    parser.add_argument("--grace-s", type=float, default=20.0)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        parser.error("no program given")
    if args.cpus and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, args.cpus)
        except OSError as problem:
            print(f"cannot run on CPUs {sorted(args.cpus)}: {problem.strerror}", file=sys.stderr)
            return CANNOT_START
    return Guard(program, grace_s=args.grace_s).run()


if __name__ == "__main__":
    raise SystemExit(main())
