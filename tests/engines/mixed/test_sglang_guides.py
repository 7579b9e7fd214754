"""Runs every command of the guides that have SGLang in them, with real workers on free ports."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_blocks import ROOT, blocks, commands
from tests.engines.guides import GUIDES, Transcript, run_guide, runnable
from tests.engines.testbed import SGLANG_CPU_KERNELS, SGLANG_ENV, SGLANG_FLAGS, sglang_python

SPLIT = GUIDES / "sglang.md"
CHANGE = GUIDES / "changing_engines.md"
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
RUN_S = 480.0
"""One to four minutes a guide on two cores, by how busy they are; most is starting SGLang."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 60)]

PARSE = """
import argparse, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
for argv in json.load(sys.stdin):
    parser = argparse.ArgumentParser(prog="sglang.launch_server")
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(argv)
    mode, backend = args.disaggregation_mode, args.disaggregation_transfer_backend
    print(json.dumps([args.model_path, args.port, mode, backend]))
"""


def environment() -> dict[str, str]:
    """Return what the reader of a guide has in the environment; no GPU: the stand-in kernels."""
    path = [str(SGLANG_CPU_KERNELS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"MODEL": str(MODEL), "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Transcript:
    return run_guide(
        SPLIT,
        tmp_path_factory.mktemp("sglang-guide"),
        within_s=RUN_S,
        python=sglang_python(),
        env=environment(),
    )


@pytest.fixture(scope="module")
def change(tmp_path_factory) -> Transcript:
    folders = {
        "VLLM_ENV": str(Path(sys.executable).parent.parent),
        "SGLANG_ENV": str(sglang_python().parent.parent),
    }
    return run_guide(
        CHANGE,
        tmp_path_factory.mktemp("changing-guide"),
        within_s=RUN_S,
        python=Path(sys.executable),
        env={**environment(), **folders},
    )


@pytest.fixture
def guided(split) -> Transcript:
    assert split.code == 0, "the guide did not run to its end: see the first test"
    return split


@pytest.fixture
def changed(change) -> Transcript:
    assert change.code == 0, "the guide did not run to its end: see its first test"
    return change


def records_of(done: Transcript):
    return [json.loads(t) for t in (done.folder / "records.jsonl").read_text().splitlines()]


# From one SGLang to a split SGLang -----------------------------------------------------------


def test_every_command_of_the_guide_succeeds_in_order(split) -> None:
    assert split.code == 0, split.story()
    assert list(split.outputs) == [b.line for b in runnable(SPLIT)]
    assert split.left == []


def test_doctor_finds_the_environment_ready(guided) -> None:
    said = guided.after("disagg doctor\n")
    assert "PROBLEM" not in said
    assert "found by SGLang" in said
    assert "DISAGG_POLICY is not set here" in said


def test_the_policy_is_right_and_explained(guided) -> None:
    said = guided.after("disagg policy check")
    assert "right; 3 workers: today (both), prefill (prefill), decode (decode)" in said
    assert "PROBLEM" not in said


def test_each_request_goes_where_the_guide_says(guided) -> None:
    alone, chat, long, two, *_ = records_of(guided)
    assert (alone["route"], alone["decode"]) == ("local", "today"), "only today's server is there"
    assert (chat["route"], chat["decode"]) == ("local", "today"), "the short chat stays whole"
    assert (long["prefill"], long["decode"]) == ("prefill", "decode")
    assert long["split"] == "yes"
    assert long["handoff"]["outcome"] == "consumed"
    assert long["handoff"]["tokens_loaded"] == long["prompt_tokens"]
    assert long["handoff"]["tokens_recomputed"] == 0
    assert (two["route"], two["decode"]) == ("local", "today"), "n of 2 cannot be split"


def test_metrics_and_doctor_agree_that_the_split_happens(guided) -> None:
    counted = guided.after("/metrics")
    assert 'disagg_handoffs_total{outcome="consumed"} 1.0' in counted
    (moved,) = re.findall(r"^sglang:kv_transfer_total_mb_count\{.*\} (\S+)", counted, re.M)
    # SGLang sends itself a request when it starts, through a backend of its own.
    assert float(moved) >= 1
    (taken,) = re.findall(r"^disagg_tokens_from_handoff_total (\S+)", counted, re.M)
    assert float(taken) > 400
    said = guided.after("doctor --live")
    assert "1 of the last 4 requests were split, all with KV loaded" in said


def test_the_comparison_answers_every_request_on_both_sides(guided) -> None:
    said = guided.after("disagg bench")
    results = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [(r["requests"], r["failed"]) for r in results] == [(4, 0), (4, 0)]


def test_without_decode_todays_server_gives_the_same_answer(guided) -> None:
    lines = guided.after("kill $DECODE").splitlines()
    before, after = [json.loads(line) for line in lines if line.startswith("{")]
    assert before["choices"][0]["text"] == after["choices"][0]["text"]
    *_, ours, theirs = records_of(guided)
    # the prompt was sent before, so less of it is left to read than splitting pays for
    assert ours["split"] == "no"
    assert "that a decode worker holds" in ours["why"]
    assert theirs["split"] in ("no", "no: decode refused")
    assert theirs["decode"] == "today"


def test_the_old_sglang_still_serves_after_the_rollback(guided) -> None:
    assert '"my-model"' in guided.after("kill $PREFILL")


def test_sglang_itself_accepts_the_flags_of_the_gpu_commands() -> None:
    argvs = []
    for block in (b for b in blocks(SPLIT) if b.use == "gpu"):
        for command in commands(block):
            words = shlex.split(command.partition(" > ")[0].partition("sglang.launch_server ")[2])
            argvs.append([w.replace("$MODEL", "a/model") for w in words])
    done = subprocess.run(
        [str(sglang_python()), "-W", "ignore", "-c", PARSE],
        input=json.dumps(argvs),
        env={**os.environ, **SGLANG_ENV, **environment()},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parsed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert [p[:2] for p in parsed] == [["a/model", 8000], ["a/model", 8101], ["a/model", 8102]]
    assert [p[2:] for p in parsed[1:]] == [["prefill", "disagg"], ["decode", "disagg"]]


@pytest.mark.parametrize("guide", [SPLIT, CHANGE], ids=lambda guide: guide.name)
def test_the_flags_for_a_cpu_are_those_of_the_testbed(guide) -> None:
    (given,) = re.findall(r'^(?:CPU|SGLANG)_FLAGS="(--device .*)"$', guide.read_text(), re.M)
    assert set(SGLANG_FLAGS) <= set(given.split())


# From vLLM to SGLang and back ----------------------------------------------------------------


def test_every_command_of_the_way_there_and_back_succeeds_in_order(change) -> None:
    assert change.code == 0, change.story()
    assert list(change.outputs) == [b.line for b in runnable(CHANGE)]
    assert change.left == []


@pytest.mark.parametrize(
    ("title", "form", "computed", "cached"),
    [
        ("1. Decode moves to SGLang", "canonical", 0, False),
        ("2. Prefill moves to SGLang", "native", 0, False),
        ("3. Decode moves to vLLM", "canonical", 1, False),
        ("4. Prefill moves to vLLM", "native", 1, True),
    ],
)
def test_after_each_move_the_answer_is_the_same_and_was_handed_over(
    changed, title: str, form: str, computed: int, cached: bool
) -> None:
    said = changed.under(title)
    assert "the same answer" in said
    ((split, how, loaded, prompt),) = re.findall(
        r"split: (\w+) form: (\w+) loaded: (\d+) of (\d+)", said
    )
    assert (split, how) == ("yes", form)
    if cached:
        assert 0 < int(loaded) < int(prompt) / 2
    else:
        assert int(loaded) == int(prompt) - computed
    assert "PROBLEM" not in said


def test_what_sglang_cannot_take_over_from_vllm_is_refused_and_the_reason_told(changed) -> None:
    said = changed.after('"logprobs": 1')
    assert "logprobs of a first token that another engine sampled" in said
    assert "n > 1" in said
    refused = [r for r in records_of(changed) if r["status"] == 400]
    assert len(refused) in (0, 2), "a refused request has no record, or one of its own"


def test_vllms_decode_serves_again_what_cannot_be_split(changed) -> None:
    said = changed.under("3. Decode moves to vLLM")
    (answer,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert len(answer["choices"]) == 2


def test_only_the_engines_of_the_policy_changed_on_the_way() -> None:
    edits = re.findall(r"^sed -i '(.*)' disagg\.yaml$", CHANGE.read_text(), re.M)
    moves = [re.fullmatch(r"/name: (\w+)/s/engine: (\w+)/engine: (\w+)/", e) for e in edits]
    assert [m and m.groups() for m in moves] == [
        ("decode", "vllm", "sglang"),
        ("prefill", "vllm", "sglang"),
        ("decode", "sglang", "vllm"),
        ("prefill", "sglang", "vllm"),
    ]
