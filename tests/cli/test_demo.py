"""``disagg demo`` says what is missing before it starts anything."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

HIDING = """
import importlib.abc, importlib.metadata, sys
hidden = "torch"
class Hides(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == hidden or name.startswith(hidden + "."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hides())
version = importlib.metadata.version
def without(name):
    if name == hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without
"""
"""As ``sitecustomize.py``: an environment without torch, for every process started in it."""


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """Return the environment of processes that find no torch."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *([others] if others else [])])}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_environment_without_torch_is_refused_with_the_way_to_add_it(
    disagg: Any, tmp_path: Path, no_torch: dict[str, str]
) -> None:
    done = disagg("demo", env=no_torch, process=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.search("has no .*torch", done.stderr)
    assert "disagg-plugins[reference]" in done.stderr
    assert "starting" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".run").exists()


@pytest.mark.parametrize("python", ["no/python", "no-such-python"])
def test_an_interpreter_that_is_not_there_is_refused_in_words_of_the_demo(
    here: Path, disagg: Any, python: str
) -> None:
    done = disagg("demo", "--python", python)
    assert done.returncode == 2
    assert f"--python: {python!r} is no interpreter that can be run" in done.stderr
    assert "policy" not in done.stderr
    assert "--model" not in done.stderr
    assert not (here / ".run").exists()


def test_an_interpreter_that_does_not_run_is_refused_in_words_of_the_demo(
    here: Path, disagg: Any
) -> None:
    (here / "python").write_text("#!/bin/sh\nexit 3\n")
    (here / "python").chmod(0o755)
    done = disagg("demo", "--python", "./python")
    assert done.returncode == 2
    assert f"--python: {here / 'python'} cannot tell what it has" in done.stderr
    assert "launch.python" not in done.stderr


def test_a_wrong_model_is_told_of_model_and_not_of_python(here: Path, disagg: Any) -> None:
    done = disagg("demo", "--model", "no/model")
    assert done.returncode == 2
    assert f"--model: {here / 'no/model'} is not the folder of a model" in done.stderr
    assert "launch.model" not in done.stderr
    assert not (here / ".run").exists()


@pytest.mark.parametrize("more", [(), ("--model", "m")])
def test_an_engine_that_nobody_starts_is_refused(
    here: Path, disagg: Any, more: tuple[str, ...]
) -> None:
    done = disagg("demo", "--engine", "other", *more)
    assert done.returncode == 2
    assert "no plugin installed here starts the engine 'other'" in done.stderr


@pytest.mark.parametrize("more", [(), ("--model", "m")])
@pytest.mark.parametrize("engine", ["trtllm", "trtllm-native"])
def test_an_engine_that_needs_what_the_demo_does_not_give_is_refused_before_it_starts(
    here: Path, disagg: Any, engine: str, more: tuple[str, ...]
) -> None:
    done = disagg("demo", "--engine", engine, *more)
    assert done.returncode == 2
    assert f"--engine: the demo cannot start {engine}: " in done.stderr
    assert "names no file of engine options" in done.stderr
    assert "`disagg up`" in done.stderr
    assert "starting" not in done.stderr
    assert not (here / ".run").exists()


def test_an_engine_other_than_the_reference_needs_a_model(here: Path, disagg: Any) -> None:
    done = disagg("demo", "--engine", "vllm")
    assert done.returncode == 2
    assert "--model: no model for vllm" in done.stderr
