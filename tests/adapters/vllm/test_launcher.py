from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Policy
from disagg_vllm.launcher import VllmLauncher


def command(tmp_path: Path, **launch: Any) -> Any:
    worker = {
        "name": "p0",
        "url": "http://127.0.0.1:8101",
        "role": "prefill",
        "launch": {"model": "org/model", "python": sys.executable, **launch},
    }
    decode = {"name": "d0", "url": "http://127.0.0.1:8102", "role": "decode"}
    policy = Policy.model_validate({"model": "smol", "fleet": {"workers": [worker, decode]}})
    return VllmLauncher().command(policy.fleet.workers[0], policy, tmp_path / "disagg.yaml")


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_server_is_started_as_a_module_with_the_workers_address(tmp_path: Path) -> None:
    argv = command(tmp_path).argv
    assert argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    assert (flag(argv, "--host"), flag(argv, "--port")) == ("127.0.0.1", "8101")
    assert flag(argv, "--served-model-name") == "smol"


def test_connector_is_configured_with_the_policy_and_the_workers_name(tmp_path: Path) -> None:
    config = json.loads(flag(command(tmp_path).argv, "--kv-transfer-config"))
    assert config == {
        "kv_connector": "DisaggConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"policy": str(tmp_path / "disagg.yaml"), "worker": "p0"},
    }


def test_model_folder_beside_the_policy_becomes_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    argv = command_with_model(tmp_path, "weights")
    assert flag(argv, "--model") == str(tmp_path / "weights")


def command_with_model(tmp_path: Path, name: str) -> tuple[str, ...]:
    worker = {
        "name": "p0",
        "url": "http://127.0.0.1:8101",
        "role": "both",
        "launch": {"model": name, "python": sys.executable},
    }
    policy = Policy.model_validate({"fleet": {"workers": [worker]}})
    found = VllmLauncher().command(policy.fleet.workers[0], policy, tmp_path / "disagg.yaml")
    return found.argv


def test_hub_name_stays_as_it_is_and_is_the_served_name(tmp_path: Path) -> None:
    argv = command_with_model(tmp_path, "org/model")
    assert flag(argv, "--model") == flag(argv, "--served-model-name") == "org/model"


def test_interpreter_is_relative_to_the_policy_and_its_link_is_kept(tmp_path: Path) -> None:
    link = tmp_path / "venv" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    assert command(tmp_path, python="venv/bin/python").argv[0] == str(link)


@pytest.mark.parametrize("python", ["venv/bin/python", "no-such-python"])
def test_missing_interpreter_is_an_error_that_names_worker_and_key(
    tmp_path: Path, python: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        command(tmp_path, python=python)
    assert caught.value.key == "fleet.workers.p0.launch.python"
    assert repr(python) in str(caught.value)


@pytest.mark.parametrize("arg", ["--port", "--port=9000", "--kv-transfer-config={}", "--model"])
def test_flag_that_the_policy_sets_is_refused(tmp_path: Path, arg: str) -> None:
    with pytest.raises(ConfigError, match="leave the flag out"):
        command(tmp_path, args=[arg])


def test_flags_and_environment_of_the_policy_come_last(tmp_path: Path) -> None:
    found = command(
        tmp_path,
        args=["--enforce-eager"],
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        cpus=[0, 1],
    )
    assert found.argv[-1] == "--enforce-eager"
    assert found.env == {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def test_cpus_are_bound_and_shared_among_ranks(tmp_path: Path) -> None:
    assert command(tmp_path, cpus=[2, 3]).env == {"VLLM_CPU_OMP_THREADS_BIND": "2,3"}
    found = command(tmp_path, cpus=[0, 1, 2, 3], args=["--tensor-parallel-size", "2"])
    assert found.env == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}


@pytest.mark.parametrize("args", [["-tp", "2"], ["--tensor-parallel-size=2"]])
def test_tensor_parallel_size_is_read_from_the_flags(tmp_path: Path, args: list[str]) -> None:
    found = command(tmp_path, cpus=[0, 1], args=args)
    assert found.env == {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_secret_is_never_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
    found = command(tmp_path)
    assert "0123456789abcdef" not in " ".join([*found.argv, *found.env.values()])
