"""What ``disagg demo`` would start, and how what it cannot start is told."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.demo import DemoCommand
from disagg_plugins.cli.demo_fleet import launch_python, policy, refusal

if TYPE_CHECKING:
    import pytest


def given(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    DemoCommand().configure(parser)
    return parser.parse_args(words)


def workers(args: argparse.Namespace) -> Any:
    return policy(args, (1, 2), 3)["fleet"]["workers"]  # type: ignore[index]


def test_a_relative_interpreter_starts_at_the_current_folder_and_its_link_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "venv" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    args = given("--python", "venv/bin/python")
    assert launch_python(args.python) == str(link)
    assert all(worker["launch"]["python"] == str(link) for worker in workers(args))


def test_an_interpreter_by_name_stays_a_name() -> None:
    assert launch_python("python3.12") == "python3.12"
    assert launch_python("~/venv/bin/python") == str(Path.home() / "venv/bin/python")


def test_each_finding_is_told_of_its_own_option_once() -> None:
    found = [
        Finding(Level.PROBLEM, "vllm", "not installed for py", "install it"),
        Finding(Level.PROBLEM, "model of prefill", "m is none", "correct launch.model"),
        Finding(Level.PROBLEM, "model of decode", "m is none", "correct launch.model"),
        Finding(Level.PROBLEM, "interpreter of prefill", "py hangs", "correct launch.python"),
    ]
    assert str(refusal(found)) == (
        "--python: not installed for py (install it); "
        "--model: m is none (name the folder of a model); "
        "--python: py hangs (name the python of the environment that has the engine)"
    )


def test_the_home_of_a_user_who_is_not_known_is_no_crash() -> None:
    assert launch_python("~nobodyx/python").endswith("/~nobodyx/python")
