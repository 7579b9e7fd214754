"""Runs every command of a migration guide, in order, with real workers on free ports."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from disagg_plugins.launch.local import tail_of
from tests.doc_blocks import ROOT, Block, blocks

GUIDES = ROOT / "migration_guides"
PORT = re.compile(r"\b(8000|810[0-2])\b")
"""The ports that the guides name."""

STOP_S = 15.0
MARKER = "=== line "

PIP = """#!/bin/sh
# uv makes environments without pip; what the guide asks of pip, uv's own does in the same words.
exec {uv} pip "$@"
"""

CURL = """#!{python}
# For machines without curl: the options that the guides use.
import argparse, sys, urllib.error, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-s", action="store_true")
parser.add_argument("-f", action="store_true")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d")
parser.add_argument("url")
args = parser.parse_args()
headers = dict(h.split(": ", 1) for h in args.H)
request = urllib.request.Request(args.url, args.d and args.d.encode(), headers)
try:
    sys.stdout.write(urllib.request.urlopen(request, timeout=120).read().decode())
except urllib.error.HTTPError as error:
    if args.f:
        sys.exit(22)
    sys.stdout.write(error.read().decode())
except OSError:
    sys.exit(7)
"""


@dataclass(frozen=True)
class Transcript:
    """What running a guide gave.

    Attributes:
        guide: The page.
        code: The shell's exit code; None when it had to be ended.
        outputs: What each block printed, by its line in the guide.
        folder: Where it ran.
        left: Command lines of processes that were still there afterwards.
    """

    guide: Path
    code: int | None
    outputs: Mapping[int, str]
    folder: Path
    left: list[str]

    def after(self, command: str) -> str:
        """Return what the block that holds ``command`` printed."""
        (line,) = [b.line for b in runnable(self.guide) if command in b.text]
        return self.outputs[line]

    def under(self, title: str) -> str:
        """Return what the blocks of a section printed, up to the next heading of any level."""
        text = self.guide.read_text()
        start = text.index(f"\n## {title}")
        end = text.find("\n## ", start + 1)
        first, last = (text.count("\n", 0, at) + 1 for at in (start, end if end > 0 else len(text)))
        return "\n".join(said for line, said in self.outputs.items() if first <= line <= last)

    def story(self) -> str:
        """Return the end of everything, for a failure's message."""
        parts = [f"exit code {self.code}", *list(self.outputs.values())[-2:]]
        logs = sorted(self.folder.glob("*.log"))
        parts += [f"{log.name}: " + "\n| ".join(tail_of(log)) for log in logs]
        return "\n".join(parts)


def runnable(guide: Path) -> list[Block]:
    """Return the blocks that are executed."""
    return [b for b in blocks(guide) if b.use == "run"]


def own_programs(folder: Path) -> Path:
    """Return a folder with what the guides call and this machine may lack."""
    folder.mkdir()
    uv = shutil.which("uv") or ROOT / ".venvs" / "tools" / "bin" / "uv"
    programs = {"pip": PIP.format(uv=uv)}
    if shutil.which("curl") is None:
        programs["curl"] = CURL.format(python=sys.executable)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def free_ports(count: int) -> list[str]:
    """Return different ports below those that the kernel gives to outgoing connections.

    A worker binds its port a minute later; until then nobody else must be given it.
    """
    with contextlib.ExitStack() as stack:
        found: list[str] = []
        for port in random.sample(range(20_000, 32_000), 200):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(str(port))
            if len(found) == count:
                return found
    raise OSError(f"found {len(found)} free ports, {count} are needed")


def make_script(guide: Path, folder: Path) -> Path:
    """Write a guide as one script and its files."""
    ports = dict(zip(("8000", "8100", "8101", "8102"), free_ports(4), strict=True))
    lines = ["set -euo pipefail"]
    for block in blocks(guide):
        text = PORT.sub(lambda m: ports[m[0]], block.text)
        if block.use == "run":
            lines += [f"echo; echo '{MARKER}{block.line}'", text]
        elif block.use.startswith("save="):
            (folder / block.use.removeprefix("save=")).write_text(text)
    script = folder / "guide.sh"
    script.write_text("\n".join(lines))
    return script


def children_of_us() -> list[psutil.Process]:
    """Return every process that this one started and that still is there."""
    return psutil.Process().children(recursive=True)


def run_guide(
    guide: Path, folder: Path, *, within_s: float, python: Path, env: Mapping[str, str]
) -> Transcript:
    """Run a guide under a guard, which ends every process that the guide leaves behind.

    Args:
        guide: The page.
        folder: Where to run it.
        within_s: After that it is ended.
        python: The interpreter that the reader of the guide has on PATH, with its neighbours.
        env: Environment of the reader.
    """
    script = make_script(guide, folder)
    path = [own_programs(folder / "bin"), python.parent, os.environ["PATH"]]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DISAGG_")}
    env = {
        **inherited,
        "PATH": os.pathsep.join(map(str, path)),
        "VIRTUAL_ENV": str(python.parent.parent),
        **env,
    }
    guard = ["-m", "disagg_plugins.launch.guard", "--grace-s", f"{STOP_S:g}", "--"]
    before = {p.pid for p in children_of_us()}
    with (folder / "transcript").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *guard, "bash", str(script)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
        )
        with process:
            try:
                code: int | None = process.wait(within_s)
            except subprocess.TimeoutExpired:
                code = None
            # A closed standard input tells the guard to end the whole tree.
            assert process.stdin is not None
            process.stdin.close()
            process.wait(STOP_S * 2)
    pieces = (folder / "transcript").read_text(errors="replace").split(MARKER)[1:]
    outputs = {int(p.partition("\n")[0]): p.partition("\n")[2] for p in pieces}
    left = [" ".join(p.cmdline()) for p in children_of_us() if p.pid not in before]
    return Transcript(guide, code, outputs, folder, left)
