"""What installing this project beside vLLM does to vLLM: nothing but to add a connector."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

FREEZE = Path(sys.prefix) / "engine-freeze.txt"
"""What ``make vllm`` had installed just before this project came beside it."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return every distribution's version by its normalised name."""
    folder = sysconfig.get_path("purelib")
    # The folder alone: on the path there may be others, with what setuptools brings along.
    found = importlib.metadata.distributions(path=[folder])
    return {normalised(d.metadata["Name"]): d.version for d in found}


@pytest.mark.skipif(not FREEZE.is_file(), reason="this environment was not made by `make vllm`")
def test_installing_this_project_moved_no_version_of_the_engines_environment() -> None:
    lines = [line.split("==") for line in FREEZE.read_text().splitlines() if "==" in line]
    before = {normalised(name): version for name, version in lines}
    now = installed()
    assert len(before) > 50
    assert {name: now.get(name) for name in before} == before


def test_vllm_finds_the_connector_by_its_own_entry_point() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_plugins_by_group

    found = load_plugins_by_group("vllm.general_plugins")
    assert "disagg_plugins" in found
    found["disagg_plugins"]()
    found["disagg_plugins"]()
    connector = KVConnectorFactory.get_connector_class_by_name("DisaggConnector")
    assert connector.__module__ == "disagg_vllm.connector"
