"""Runs what of the guide can run without TensorRT-LLM, and holds its files to what is read here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from disagg_plugins.policy import Policy
from disagg_reference.trtllm.host import read_connector_config
from disagg_trtllm.checks import NOT_RUN
from tests.doc_blocks import blocks
from tests.engines.guides import GUIDES, run_guide, runnable

GUIDE = GUIDES / "tensorrt_llm.md"
RUN_S = 120.0

pytestmark = pytest.mark.timeout(RUN_S + 60)


def saved(name: str) -> str:
    (found,) = [b.text for b in blocks(GUIDE) if b.use == f"save={name}"]
    return found


def test_every_command_that_needs_no_gpu_succeeds(tmp_path: Path) -> None:
    transcript = run_guide(GUIDE, tmp_path, within_s=RUN_S, python=Path(sys.executable), env={})
    assert transcript.code == 0, transcript.story()
    assert list(transcript.outputs) == [b.line for b in runnable(GUIDE)]
    assert transcript.left == []


def test_the_connectors_options_are_those_that_a_host_reads(tmp_path: Path) -> None:
    path = tmp_path / "kv_connector.yaml"
    path.write_text(yaml.safe_dump({
        "kv_connector_config": yaml.safe_load(saved("kv_connector.yaml"))["kv_connector_config"]
    }))  # fmt: skip
    assert read_connector_config(path)[0] == "disagg_trtllm.connector"


@pytest.mark.parametrize("name", ["today.yaml", "native.yaml", "connector.yaml"])
def test_its_policies_are_policies(name: str) -> None:
    Policy.model_validate(yaml.safe_load(saved(name)))


def test_it_says_what_was_not_run() -> None:
    text = " ".join(GUIDE.read_text().split())
    assert NOT_RUN in text
    rows = [line for line in GUIDE.read_text().splitlines() if line.endswith("| not run |")]
    assert len(rows) == 12
