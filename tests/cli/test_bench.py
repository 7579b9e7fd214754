from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine


def test_table_is_printed_and_json_is_the_last_line(disagg: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with FakeEngine() as engine:
        done = disagg(
            "bench", engine.url, "--requests", 4, "--output-tokens", 6, "--output", output
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert result["model"] == "fake-model"
    assert result["output_tokens"] == 24
    assert result == json.loads(output.read_text())
    assert [line.split()[0] for line in lines[1:5]] == ["TTFT", "ITL", "TPOT", "E2E"]
    assert done.stderr == "4 of 4 requests\n"


def test_failed_requests_exit_with_one(disagg: Any) -> None:
    with FakeEngine(behaviour=Behaviour(status=500)) as engine:
        done = disagg("bench", engine.url, "--requests", 2, "--model", "fake-model")
    assert done.returncode == 1
    assert "failed: LoadError: status 500" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == 2


def test_number_that_makes_no_sense_is_refused(disagg: Any) -> None:
    done = disagg("bench", "http://127.0.0.1:1", "--concurrency", 0)
    assert done.returncode == 2
    assert "--concurrency: 0 is not at least 1" in done.stderr
