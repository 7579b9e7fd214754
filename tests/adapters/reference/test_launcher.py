"""The command by which a worker is started follows from the policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Policy
from disagg_reference.launcher import OURS, ReferenceLauncher
from disagg_reference.serve import parser

if TYPE_CHECKING:
    from disagg_plugins.launch.interfaces import LaunchCommand


def command(tmp_path: Path, **launch: Any) -> LaunchCommand:
    worker = {
        "name": "p0",
        "url": "http://127.0.0.1:8101",
        "role": "both",
        "launch": {"model": "tiny", "python": sys.executable, **launch},
    }
    policy = Policy.model_validate({"model": "demo", "fleet": {"workers": [worker]}})
    return ReferenceLauncher().command(policy.fleet.workers[0], policy, tmp_path / "disagg.yaml")


def test_the_server_understands_all_that_it_is_told(tmp_path: Path) -> None:
    argv = command(tmp_path, args=["--block-size", "16"]).argv
    assert argv[:3] == (sys.executable, "-m", "disagg_reference.serve")
    given = parser().parse_args(argv[3:])
    assert (str(given.model), given.served_model_name) == ("tiny", "demo")
    assert (given.host, given.port, given.block_size) == ("127.0.0.1", 8101, 16)
    assert (given.policy, given.worker) == (str(tmp_path / "disagg.yaml"), "p0")


def test_a_model_beside_the_policy_becomes_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    argv = command(tmp_path, model="weights").argv
    assert argv[argv.index("--model") + 1] == str(tmp_path / "weights")


def test_pinned_workers_have_a_thread_for_each_cpu(tmp_path: Path) -> None:
    assert command(tmp_path, cpus=[0, 1]).env["OMP_NUM_THREADS"] == "2"
    own = command(tmp_path, cpus=[0, 1], env={"OMP_NUM_THREADS": "1"})
    assert own.env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("flag", OURS)
def test_flags_that_follow_from_the_policy_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        command(tmp_path, args=[flag, "x"])
