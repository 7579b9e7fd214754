"""Runs every command of the migration guide, in order, with real vLLM workers on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from disagg_plugins.launch.local import tail_of
from tests.doc_blocks import ROOT, blocks, commands

GUIDE = ROOT / "migration_guides" / "vllm.md"
MODEL = ROOT / ".models" / "tiny"
RUN_S = 480.0
"""One to four minutes on two cores, by how busy they are; most is three engines that start."""

STOP_S = 15.0
PORT = re.compile(r"\b(8000|810[0-2])\b")
LOGS = ("today", "prefill", "decode", "gateway")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 60)]

PIP = """#!/bin/sh
# uv makes environments without pip; what the guide asks of pip, uv's own does in the same words.
exec {uv} pip "$@"
"""

CURL = """#!{python}
# For machines without curl: the options that the guide uses.
import argparse, sys, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("-sf", action="store_true")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d")
parser.add_argument("url")
args = parser.parse_args()
headers = dict(h.split(": ", 1) for h in args.H)
request = urllib.request.Request(args.url, args.d and args.d.encode(), headers)
try:
    sys.stdout.write(urllib.request.urlopen(request, timeout=120).read().decode())
except OSError:
    sys.exit(22)
"""

PARSE = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for argv in json.load(sys.stdin):
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    args = parser.parse_args(argv)
    print(json.dumps([args.model_tag, args.port, args.kv_transfer_config is not None]))
"""


@dataclass(frozen=True)
class Transcript:
    """What running the guide gave.

    Attributes:
        code: The shell's exit code; None when it had to be ended.
        outputs: What each block printed, by its line in the guide.
        folder: Where it ran.
        left: Command lines of processes that were still there afterwards.
    """

    code: int | None
    outputs: Mapping[int, str]
    folder: Path
    left: list[str]

    def after(self, command: str) -> str:
        """Return what the block that holds ``command`` printed."""
        (line,) = [b.line for b in runnable() if command in b.text]
        return self.outputs[line]

    def story(self) -> str:
        """Return the end of everything, for a failure's message."""
        parts = [f"exit code {self.code}", *list(self.outputs.values())[-2:]]
        parts += [f"{n}.log: " + "\n| ".join(tail_of(self.folder / f"{n}.log")) for n in LOGS]
        return "\n".join(parts)


def runnable():
    return [b for b in blocks(GUIDE) if b.use == "run"]


def own_programs(folder: Path) -> Path:
    """Return a folder with what the guide calls and this machine may lack."""
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


def make_script(folder: Path) -> tuple[Path, str]:
    """Write the guide as one script and its files; return the script and its markers' prefix."""
    ports = dict(zip(("8000", "8100", "8101", "8102"), free_ports(4), strict=True))
    marker = "=== line "
    lines = ["set -euo pipefail"]
    for block in blocks(GUIDE):
        text = PORT.sub(lambda m: ports[m[0]], block.text)
        if block.use == "run":
            lines += [f"echo; echo '{marker}{block.line}'", text]
        elif block.use.startswith("save="):
            (folder / block.use.removeprefix("save=")).write_text(text)
    script = folder / "guide.sh"
    script.write_text("\n".join(lines))
    return script, marker


def children_of_us() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def transcript(tmp_path_factory) -> Transcript:
    """Run the guide under a guard, which ends every process that the guide leaves behind."""
    folder = tmp_path_factory.mktemp("guide")
    script, marker = make_script(folder)
    path = [own_programs(folder / "bin"), Path(sys.executable).parent, os.environ["PATH"]]
    env = {k: v for k, v in os.environ.items() if k != "DISAGG_SECRET"}
    env |= {
        "PATH": os.pathsep.join(map(str, path)),
        "MODEL": str(MODEL),
        "VIRTUAL_ENV": sys.prefix,
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
                code: int | None = process.wait(RUN_S)
            except subprocess.TimeoutExpired:
                code = None
            # A closed standard input tells the guard to end the whole tree.
            process.stdin.close()
            process.wait(STOP_S * 2)
    pieces = (folder / "transcript").read_text(errors="replace").split(marker)[1:]
    outputs = {int(p.partition("\n")[0]): p.partition("\n")[2] for p in pieces}
    left = [" ".join(p.cmdline()) for p in children_of_us() if p.pid not in before]
    return Transcript(code, outputs, folder, left)


@pytest.fixture
def done(transcript) -> Transcript:
    assert transcript.code == 0, "the guide did not run to its end: see the first test"
    return transcript


def test_every_command_of_the_guide_succeeds_in_order(transcript) -> None:
    assert transcript.code == 0, transcript.story()
    assert list(transcript.outputs) == [b.line for b in runnable()]


def test_nothing_of_the_guide_keeps_running(transcript) -> None:
    assert transcript.left == []


def test_doctor_finds_the_environment_ready(done) -> None:
    said = done.after("disagg doctor\n")
    assert "PROBLEM" not in said
    assert "found by vLLM" in said


def test_the_policy_is_right_and_explained(done) -> None:
    said = done.after("disagg policy check")
    assert "disagg.yaml: right; 2 workers: prefill (prefill), decode (decode)" in said
    assert "at least 256 tokens" in said


def test_the_request_was_split_and_the_record_says_so(done) -> None:
    records = [json.loads(t) for t in (done.folder / "records.jsonl").read_text().splitlines()]
    first = next(r for r in records if r["route"] == "disaggregated")
    assert first["split"] == "yes"
    assert first["handoff"]["outcome"] == "consumed"
    assert first["handoff"]["tokens_loaded"] == first["prompt_tokens"] - 1
    assert records[0]["route"] == "local", "the short chat stays whole"


def test_metrics_and_doctor_agree_that_the_split_happens(done) -> None:
    counted = done.after("/metrics")
    assert 'disagg_handoffs_total{outcome="consumed"} 1.0' in counted
    (loaded,) = re.findall(r"^vllm:disagg_loaded_tokens_total\{.*\} (\S+)", counted, re.M)
    (taken,) = re.findall(r"^disagg_tokens_from_handoff_total (\S+)", counted, re.M)
    # The KV of the last prompt token comes along; decode computes that token all the same.
    assert float(taken) > 400
    assert float(loaded) - float(taken) in (0, 1)
    said = done.after("doctor --live")
    assert "PROBLEM" not in said
    assert "1 of the last 2 requests were split, all with KV loaded" in said


def test_the_comparison_answers_every_request_on_both_sides(done) -> None:
    said = done.after("disagg bench")
    results = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(r["requests"], r["failed"]) for r in results] == [(6, 0), (6, 0)]


def test_the_old_vllm_still_serves_after_the_rollback(done) -> None:
    assert '"my-model"' in done.after("/v1/models")


def test_vllm_itself_accepts_the_flags_of_the_gpu_commands() -> None:
    argvs = []
    for block in (b for b in blocks(GUIDE) if b.use == "gpu"):
        for command in commands(block):
            words = shlex.split(command.partition(" > ")[0].partition("vllm serve ")[2])
            argvs.append([w.replace("$MODEL", "a/model") for w in words])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps(argvs),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parsed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert parsed == [["a/model", 8000, False], ["a/model", 8101, True], ["a/model", 8102, True]]
