from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disagg_plugins.scheduling.profile_file import read_profile

SECRET = {"DISAGG_SECRET": "0123456789abcdef-for-tests"}


def line(i: int) -> str:
    tokens = 100 + 37 * i
    told = {
        "outcome": "ok",
        "stream": True,
        "route": "local",
        "decode": "d0",
        "prompt_tokens": tokens,
        "output_tokens": 11,
        "sent_s": 0.0,
        "ttft_s": 0.01 + 1e-4 * tokens,
        "tpot_s": 0.02 + 1e-6 * tokens,
        "decode_requests": i % 5,
    }
    return json.dumps(told)


def test_prints_a_profile_that_can_be_read_and_how_good_it_is(disagg: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join([*(line(i) for i in range(40)), "not a record", "[1]", ""]))
    done = disagg("profile", path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "profile.yaml").write_text(done.stdout)
    [entry] = read_profile(tmp_path / "profile.yaml").measured
    assert entry.worker == "d0"
    assert entry.prefill is not None
    assert entry.prefill.fit is not None
    assert entry.prefill.fit.error_percent < 3
    assert "40 records, 40 of them tell times" in done.stderr
    assert "2 lines are no records" in done.stderr
    assert "worker d0, prefill: 40 measured, mean absolute percentage error" in done.stderr


def test_workers_of_a_policy_are_fitted_by_engine(
    disagg: Any, tmp_path: Path, write_policy: Callable[..., Path]
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(line(i) for i in range(40)))
    done = disagg("profile", path, "--policy", write_policy(), "--limit", 20, env=SECRET)
    assert done.returncode == 0, done.stderr
    assert "engine: vllm" in done.stdout
    assert "20 records" in done.stderr


def test_too_little_is_said_and_fails(disagg: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line(1))
    done = disagg("profile", path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "too little for a profile" in done.stderr


def test_a_file_that_is_not_there_is_an_error(disagg: Any, tmp_path: Path) -> None:
    done = disagg("profile", tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert "cannot read the records" in done.stderr
