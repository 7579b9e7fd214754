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


def test_an_interpreter_that_does_not_run_is_refused(disagg: Any, tmp_path: Path) -> None:
    done = disagg("demo", "--python", "no/python", process=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "no/python" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_nobody_starts_is_refused(disagg: Any, tmp_path: Path) -> None:
    done = disagg("demo", "--engine", "other", "--model", "m", process=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "no plugin installed here starts the engine 'other'" in done.stderr
