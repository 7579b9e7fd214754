"""Which build runs is told, and what the opt-in build compiles exists and can be compiled."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from disagg_plugins.build_kind import build_kind

ROOT = Path(__file__).resolve().parent.parent
HOOK = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
    "wheel"
]["hooks"]["custom"]
MODULES = [m.removesuffix(".py").replace("/", ".") for m in HOOK["modules"]]


def test_nothing_is_compiled_unless_asked_for() -> None:
    assert HOOK["enable-by-default"] is False


@pytest.mark.parametrize("name", MODULES)
def test_every_module_of_the_list_is_of_the_build_that_is_told(name: str) -> None:
    source = importlib.import_module(name).__file__
    assert source is not None
    assert source.endswith(".py") is (build_kind() == "pure Python")


@pytest.mark.parametrize("name", MODULES)
def test_no_module_of_the_list_marks_hooks(name: str) -> None:
    source = ROOT / (name.replace(".", "/") + ".py")
    if not source.exists():
        pytest.skip("the sources are not here: an installed wheel is tested")
    assert not re.search(r"^\s*@hookimpl", source.read_text(), re.MULTILINE)
