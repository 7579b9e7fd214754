"""Runs every command of the migration guide, in order, with real vLLM workers on free ports."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_blocks import ROOT, blocks, commands
from tests.engines.guides import GUIDES, Transcript, run_guide, runnable

GUIDE = GUIDES / "vllm.md"
MODEL = ROOT / ".models" / "tiny"
RUN_S = 480.0
"""One to four minutes on two cores, by how busy they are; most is three engines that start."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 60)]

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


@pytest.fixture(scope="module")
def transcript(tmp_path_factory) -> Transcript:
    return run_guide(
        GUIDE,
        tmp_path_factory.mktemp("guide"),
        within_s=RUN_S,
        python=Path(sys.executable),
        env={"MODEL": str(MODEL)},
    )


@pytest.fixture
def done(transcript) -> Transcript:
    assert transcript.code == 0, "the guide did not run to its end: see the first test"
    return transcript


def test_every_command_of_the_guide_succeeds_in_order(transcript) -> None:
    assert transcript.code == 0, transcript.story()
    assert list(transcript.outputs) == [b.line for b in runnable(GUIDE)]


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
