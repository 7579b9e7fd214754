from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Policy
from disagg_sglang.launcher import SglangLauncher, num_ranks

if TYPE_CHECKING:
    from disagg_plugins.launch.interfaces import LaunchCommand


def fleet(*workers: dict[str, Any], model: str | None = "smol") -> Policy:
    return Policy.model_validate({"model": model, "fleet": {"workers": list(workers)}})


def worker(name: str, port: int, role: str, **launch: Any) -> dict[str, Any]:
    return {
        "name": name,
        "url": f"http://127.0.0.1:{port}",
        "engine": "sglang",
        "role": role,
        "launch": {"model": "org/model", "python": sys.executable, **launch},
    }


def commands(tmp_path: Path, policy: Policy) -> list[LaunchCommand]:
    launcher = SglangLauncher()
    path = tmp_path / "disagg.yaml"
    return [launcher.command(w, policy, path) for w in policy.fleet.workers]


def prefill(tmp_path: Path, **launch: Any) -> LaunchCommand:
    policy = fleet(worker("p0", 8101, "prefill", **launch), worker("d0", 8102, "decode"))
    return commands(tmp_path, policy)[0]


def both(tmp_path: Path, *, model: str | None = "smol") -> LaunchCommand:
    return commands(tmp_path, fleet(worker("w0", 8101, "both"), model=model))[0]


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_server_is_started_as_a_module_with_the_workers_address(tmp_path: Path) -> None:
    argv = prefill(tmp_path).argv
    assert argv[:3] == (sys.executable, "-m", "sglang.launch_server")
    assert (flag(argv, "--host"), flag(argv, "--port")) == ("127.0.0.1", "8101")
    assert (flag(argv, "--model-path"), flag(argv, "--served-model-name")) == ("org/model", "smol")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_half_of_a_split_takes_its_mode_and_our_backend(tmp_path: Path, role: str) -> None:
    other = worker("x0", 8102, {"prefill": "decode", "decode": "prefill"}[role])
    argv = commands(tmp_path, fleet(worker("w0", 8101, role), other))[0].argv
    assert flag(argv, "--disaggregation-mode") == role
    assert flag(argv, "--disaggregation-transfer-backend") == "disagg"


def test_a_server_that_may_switch_its_role_begins_as_decode(tmp_path: Path) -> None:
    switching = {**worker("w0", 8101, "both"), "role_switch": True}
    argv = commands(tmp_path, fleet(switching))[0].argv
    assert "--enable-pd-role-switch" in argv
    assert flag(argv, "--disaggregation-mode") == "decode"
    assert flag(argv, "--disaggregation-transfer-backend") == "disagg"
    assert "--enable-pd-role-switch" not in both(tmp_path).argv


def test_workers_of_one_machine_have_bootstrap_ports_of_their_own(tmp_path: Path) -> None:
    workers = [
        worker("p0", 8101, "prefill"),
        worker("p1", 8102, "prefill"),
        worker("d0", 8103, "decode"),
    ]
    ports = [
        flag(c.argv, "--disaggregation-bootstrap-port") for c in commands(tmp_path, fleet(*workers))
    ]
    assert ports == ["8101", "8102", "8103"]


def test_worker_for_both_is_a_whole_server(tmp_path: Path) -> None:
    assert not [a for a in both(tmp_path).argv if a.startswith("--disaggregation")]


def test_engine_finds_its_settings_by_policy_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"DISAGG_POLICY": str(tmp_path / "disagg.yaml"), "DISAGG_WORKER": "p0"}
    assert prefill(tmp_path).env == found
    monkeypatch.chdir(tmp_path)
    assert prefill(Path()).env == found


def test_model_folder_beside_the_policy_becomes_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    policy = fleet(worker("w0", 8101, "both", model="weights"))
    argv = commands(tmp_path, policy)[0].argv
    assert flag(argv, "--model-path") == str(tmp_path / "weights")


def test_hub_name_stays_as_it_is_and_is_the_served_name(tmp_path: Path) -> None:
    argv = both(tmp_path, model=None).argv
    assert flag(argv, "--model-path") == flag(argv, "--served-model-name") == "org/model"


def test_missing_interpreter_is_an_error_that_names_worker_and_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prefill(tmp_path, python="venv/bin/python")
    assert caught.value.key == "fleet.workers.p0.launch.python"


def test_worker_without_a_launch_section_is_an_error(tmp_path: Path) -> None:
    policy = fleet(worker("w0", 8101, "both") | {"launch": None})
    with pytest.raises(ConfigError, match="no launch section"):
        commands(tmp_path, policy)


@pytest.mark.parametrize(
    "arg",
    [
        "--model-path",
        "--model=org/other",
        "--served-model-name=x",
        "--host",
        "--port=9000",
        "--disaggregation-mode",
        "--disaggregation-transfer-backend=nixl",
    ],
)
def test_flag_that_the_policy_sets_is_refused(tmp_path: Path, arg: str) -> None:
    with pytest.raises(ConfigError, match="leave the flag out"):
        prefill(tmp_path, args=[arg])


def test_flags_and_environment_of_the_policy_come_last(tmp_path: Path) -> None:
    found = prefill(
        tmp_path,
        args=["--disaggregation-bootstrap-port", "8998"],
        env={"SGLANG_CPU_OMP_THREADS_BIND": "all"},
        cpus=[0, 1],
    )
    assert found.argv[-2:] == ("--disaggregation-bootstrap-port", "8998")
    assert found.env["SGLANG_CPU_OMP_THREADS_BIND"] == "all"


@pytest.mark.parametrize(
    ("args", "bind"),
    [([], "0,1,2,3"), (["--tp", "2"], "0,1|2,3"), (["--tp-size=2", "--pp-size", "2"], "0|1|2|3")],
)
def test_cpus_are_bound_and_shared_among_ranks(tmp_path: Path, args: list[str], bind: str) -> None:
    found = prefill(tmp_path, cpus=[0, 1, 2, 3], args=args)
    assert found.env["SGLANG_CPU_OMP_THREADS_BIND"] == bind


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        ([], 1),
        (["--tensor-parallel-size", "4"], 4),
        (["--tp", "2", "--dp", "2"], 4),
        (["--tp", "4", "--dp", "2", "--enable-dp-attention"], 4),
        (["--tp", "2", "--pipeline-parallel-size=3", "--data-parallel-size=2"], 12),
    ],
)
def test_ranks_are_what_all_parallel_sizes_make(args: list[str], ranks: int) -> None:
    assert num_ranks(args) == ranks


def test_secret_is_never_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
    found = prefill(tmp_path)
    assert "0123456789abcdef" not in " ".join([*found.argv, *found.env.values()])
