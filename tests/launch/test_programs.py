from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.programs import (
    find_model,
    find_python,
    refuse_flags,
    threads_bind,
    whole_number,
)
from disagg_plugins.policy import Launch

SIZE = ("--size", "-s")


def launch(python: str) -> Launch:
    return Launch(model="org/model", python=python)


def test_interpreter_by_name_is_looked_up_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    name = Path(sys.executable).name
    assert find_python(launch(name), tmp_path, worker="p0") == sys.executable


def test_interpreter_by_path_starts_at_the_policy_and_its_link_is_kept(tmp_path: Path) -> None:
    link = tmp_path / "venv" / "bin" / "python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    assert find_python(launch("venv/bin/python"), tmp_path, worker="p0") == str(link)


@pytest.mark.parametrize("python", ["venv/bin/python", "no-such-python"])
def test_missing_interpreter_is_an_error_that_names_worker_and_key(
    tmp_path: Path, python: str
) -> None:
    with pytest.raises(ConfigError, match="the python of the environment that has the engine") as e:
        find_python(launch(python), tmp_path, worker="p0")
    assert e.value.key == "fleet.workers.p0.launch.python"
    assert repr(python) in str(e.value)


def test_model_folder_beside_the_policy_becomes_absolute_and_a_hub_name_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "weights").mkdir()
    assert find_model("weights", tmp_path) == str(tmp_path / "weights")
    assert find_model("org/model", tmp_path) == "org/model"


@pytest.mark.parametrize("arg", ["--port", "--port=9000"])
def test_flag_of_ours_is_refused_with_the_key_that_sets_it(arg: str) -> None:
    with pytest.raises(ConfigError, match="--port is set by the worker's url") as e:
        refuse_flags(
            ["--seed", "1", arg],
            {"--port": "the worker's url"},
            Path("/x/disagg.yaml"),
            worker="p0",
        )
    assert (e.value.file, e.value.key) == ("/x/disagg.yaml", "fleet.workers.p0.launch.args")


def test_longer_flag_with_the_same_beginning_is_not_refused() -> None:
    refuse_flags(["--port-range=1"], {"--port": "url"}, Path("p"), worker="p0")


@pytest.mark.parametrize(
    ("args", "number"),
    [([], 1), (["-s", "2"], 2), (["--size=4"], 4), (["--seed", "2"], 1), (["--sizes", "3"], 1)],
)
def test_whole_number_is_read_from_any_name_of_a_flag(args: list[str], number: int) -> None:
    assert whole_number(args, SIZE) == number


@pytest.mark.parametrize("args", [["-s"], ["-s", "two"], ["--size="], ["--size=0"]])
def test_flag_without_a_whole_number_is_an_error(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="needs a whole number"):
        whole_number(args, SIZE)


@pytest.mark.parametrize(
    ("cpus", "ranks", "bind"),
    [([2, 3], 1, "2,3"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([0, 1, 2], 2, "0|1")],
)
def test_cpus_are_shared_among_ranks(cpus: list[int], ranks: int, bind: str) -> None:
    assert threads_bind(cpus, ranks) == bind


def test_fewer_cpus_than_ranks_is_an_error() -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot share 1 CPUs"):
        threads_bind([0], 2)
