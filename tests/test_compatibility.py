"""The notes of which the compatibility table is made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engines import compatibility

ROOT = Path(__file__).resolve().parents[1]
BED = SimpleNamespace(
    servers=[
        SimpleNamespace(name="p", engine="vllm"),
        SimpleNamespace(name="d", engine="sglang"),
    ]
)
HELLOS = {
    "p": {"layout": "hctd vllm-cpu-f6e35c9a4ae7 block 128 float32", "tp_size": 2},
    "d": {"layout": "cthd plain block 1 float32", "tp_size": 1},
}
CONSUMED = {"outcome": "consumed", "form": "canonical"}


def record(handoff):
    return {"prefill": "p", "decode": "d", "handoff": handoff}


def test_a_consumed_handoff_proves_its_pair() -> None:
    [row] = compatibility.note(BED, HELLOS, [record(CONSUMED), record(CONSUMED)], "test_x.py::t")
    assert row == (
        "vllm",
        "sglang",
        "float32",
        "hctd vllm-cpu block 128 to cthd block 1",
        "2 to 1",
        "canonical",
        "test_x.py::t",
    )


@pytest.mark.parametrize("handoff", [None, {"outcome": "failed", "form": "native"}])
def test_nothing_else_proves_anything(handoff) -> None:
    assert compatibility.note(BED, HELLOS, [record(handoff)], "t") == set()
    assert compatibility.note(BED, {}, [record(CONSUMED)], "t") == set()


def test_notes_of_several_runs_are_merged_and_make_one_page(tmp_path) -> None:
    path = tmp_path / "notes.json"
    compatibility.merge([("vllm", "vllm", "f", "l", "1 to 1", "direct", "b::t")], path)
    compatibility.merge([("vllm", "vllm", "f", "l", "1 to 1", "direct", "a::t")], path)
    compatibility.merge([("sglang", "vllm", "f", "l", "1 to 1", "canonical", "c::t")], path)
    page = compatibility.table(compatibility.json.loads(path.read_text()))
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert lines[3] == "| vllm | vllm | f | l | 1 to 1 | direct | a::t |"
