"""Runs every command of the migration guide of a service, in order, with pretend engines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.doc_blocks import blocks, commands
from tests.engines.guides import GUIDES, Transcript, run_guide, runnable

GUIDE = GUIDES / "monolithic_to_split.md"
RUN_S = 240.0
"""About 20 s on two idle cores, most of it Python that starts; a minute beside other work."""

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(RUN_S + 60)]


@pytest.fixture(scope="module")
def transcript(tmp_path_factory) -> Transcript:
    folder = tmp_path_factory.mktemp("guide")
    return run_guide(GUIDE, folder, within_s=RUN_S, python=Path(sys.executable), env={})


def records(transcript, name):
    return [json.loads(line) for line in (transcript.folder / name).read_text().splitlines()]


def test_every_command_of_the_guide_succeeds_and_leaves_nothing(transcript) -> None:
    assert transcript.code == 0, transcript.story()
    assert list(transcript.outputs) == [b.line for b in runnable(GUIDE)]
    assert transcript.left == []


def test_no_client_saw_a_failure_from_the_first_step_to_the_last(transcript) -> None:
    counts = json.loads(transcript.after("cat clients.log").splitlines()[0])
    assert counts["failed"] == 0
    assert counts["answered"] > 100


def test_the_testers_request_was_really_split(transcript) -> None:
    (record,) = [r for r in records(transcript, "split.jsonl") if r["request_id"] == "by-a-tester"]
    assert record["arm"] == "candidate"
    assert record["split"] == "yes"
    assert record["handoff"]["outcome"] == "consumed"


def test_the_copies_agree_before_the_first_client_is_moved(transcript) -> None:
    said = transcript.after("tee before.txt")
    assert "pending" in said
    assert "worse" not in said


def test_the_log_tells_the_whole_story_with_its_reasons(transcript) -> None:
    said = transcript.after('"phase":"completed"')
    kinds = re.findall(r"UTC  (\w+) by (\w+)", said)
    assert [kind for kind, _ in kinds] == ["complete", "promote", "approve", "await", "start"]
    assert "all guardrails have proof" in said
    assert "change 1234, after the exercise" in said


def test_the_gpu_commands_are_those_of_the_guide_for_vllm() -> None:
    def servers(guide):
        return [c for b in blocks(guide) if b.use == "gpu" for c in commands(b)]

    ours = [command.replace("split.yaml", "disagg.yaml") for command in servers(GUIDE)]
    assert ours == servers(GUIDES / "vllm.md")


def test_shell_blocks_are_executed_or_marked_as_not() -> None:
    assert {b.use for b in blocks(GUIDE) if b.language == "bash"} == {"run", "gpu"}
