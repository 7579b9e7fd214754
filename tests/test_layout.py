"""Guards of the package's layout: what is listed, what is marked, how large files may be."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTAINERS = ("adapters", "connectors")
MAX_LINES = 600

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [Path(p) for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def test_every_package_is_in_the_wheel() -> None:
    found = {p.parent.relative_to(ROOT) for c in CONTAINERS for p in ROOT.glob(f"{c}/*/py.typed")}
    assert {Path("disagg_plugins"), *found} == set(PACKAGES)


def test_every_package_is_type_checked_and_under_the_import_rules() -> None:
    names = {p.name for p in PACKAGES}
    assert set(PROJECT["tool"]["mypy"]["packages"]) == names
    assert set(PROJECT["tool"]["importlinter"]["root_packages"]) == names
    independent = next(
        c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "independence"
    )
    assert set(independent["modules"]) == names - {"disagg_plugins"}


@pytest.mark.parametrize("container", CONTAINERS)
def test_container_folders_are_no_packages(container: str) -> None:
    assert not (ROOT / container / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_packages_are_marked_typed_and_named_ours(package: Path) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").is_file()
    assert package.name.startswith("disagg_")


def test_entry_points_name_modules_that_exist() -> None:
    points = PROJECT["project"]["entry-points"]
    targets = [*points["disagg_plugins"].values(), *points["vllm.general_plugins"].values()]
    targets += PROJECT["project"]["scripts"].values()
    for target in targets:
        module = target.partition(":")[0].replace(".", "/") + ".py"
        assert any((ROOT / p.parent / module).is_file() for p in PACKAGES), target


def test_the_name_that_vllm_sees_is_unique_to_this_project() -> None:
    assert list(PROJECT["project"]["entry-points"]["vllm.general_plugins"]) == ["disagg_plugins"]


def test_no_source_file_is_too_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "misc")]


def test_modules_without_a_test_module_are_reported(
    record_property: Callable[[str, object], None],
) -> None:
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests").rglob("test_*.py")}
    missing = [
        str(p.relative_to(ROOT)) for p in SOURCES if p.stem != "__init__" and p.stem not in tested
    ]
    record_property("modules_without_a_test_module", ", ".join(missing))
