"""The command line of ``trtllm-serve`` follows from the policy; nothing of it was run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Policy
from disagg_trtllm.launcher import OURS, TrtllmLauncher

if TYPE_CHECKING:
    from disagg_plugins.launch.interfaces import LaunchCommand

ARGS = ["--extra_llm_api_options", "kv_connector.yaml"]


def command(tmp_path: Path, **launch: Any) -> LaunchCommand:
    worker = {
        "name": "p0",
        "engine": "trtllm",
        "url": "http://127.0.0.1:8001",
        "role": "both",
        "launch": {"model": "org/model", "python": sys.executable, "args": ARGS, **launch},
    }
    policy = Policy.model_validate({"model": "m", "fleet": {"workers": [worker]}})
    path = tmp_path / "disagg.yaml"
    return TrtllmLauncher("trtllm").command(policy.fleet.workers[0], policy, path)


def test_the_server_is_the_program_beside_the_interpreter(tmp_path: Path) -> None:
    argv = command(tmp_path).argv
    assert argv[0] == str(Path(sys.executable).with_name("trtllm-serve"))
    assert argv[1:6] == ("org/model", "--host", "127.0.0.1", "--port", "8001")
    assert list(argv[6:]) == ARGS


def test_every_rank_finds_policy_and_name_in_its_environment(tmp_path: Path) -> None:
    env = command(tmp_path, env={"NCCL_DEBUG": "INFO"}).env
    assert env == {
        "DISAGG_POLICY": str(tmp_path / "disagg.yaml"),
        "DISAGG_WORKER": "p0",
        "NCCL_DEBUG": "INFO",
    }


@pytest.mark.parametrize("flag", OURS)
def test_flags_that_follow_from_the_policy_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        command(tmp_path, args=[*ARGS, flag, "x"])


@pytest.mark.parametrize("args", [[], ["--tp_size", "2"]])
def test_without_a_file_of_options_nothing_would_be_handed_over(tmp_path: Path, args) -> None:
    with pytest.raises(ConfigError, match="names no file of engine options"):
        command(tmp_path, args=args)


def test_newer_releases_name_the_file_otherwise(tmp_path: Path) -> None:
    assert command(tmp_path, args=["--config=kv_connector.yaml"]).argv[-1].startswith("--config")


def test_a_worker_without_a_launch_section_is_an_error(tmp_path: Path) -> None:
    workers = [{"name": "p0", "url": "http://127.0.0.1:8001", "role": "both"}]
    policy = Policy.model_validate({"fleet": {"workers": workers}})
    with pytest.raises(ConfigError, match="no launch section"):
        TrtllmLauncher("trtllm").command(policy.fleet.workers[0], policy, tmp_path / "x.yaml")
