from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins import __version__
from disagg_plugins.build_kind import build_kind
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.environment import EnvironmentCheck, WorkersCheck
from disagg_plugins.policy_file import read_policy
from disagg_plugins.testing.fake_engine import FakeEngine

WritePolicy = Callable[..., Path]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef-for-tests")


def context(path: Path, *, engines: frozenset[str] = frozenset({"vllm"})) -> CheckContext:
    loaded = read_policy(path)
    return CheckContext(loaded.policy, loaded.path, engines)


def by_subject(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {f.subject: f for f in findings}


def test_machine_that_is_ready_has_no_problem(write_policy: WritePolicy) -> None:
    findings = EnvironmentCheck().run(context(write_policy(handoff={"staging_bytes": "1MiB"})))
    assert {f.subject for f in findings} == {
        "python", "disagg-plugins", "secret", "open files", "memory",
    }  # fmt: skip
    assert not [f for f in findings if f.level is Level.PROBLEM]


def test_without_a_policy_only_the_machine_is_looked_at() -> None:
    found = EnvironmentCheck().run(CheckContext())
    assert [f.subject for f in found] == ["python", "disagg-plugins"]
    assert found[1].detail == f"{__version__}, {build_kind()}"


@pytest.mark.parametrize(
    ("launch", "level"),
    [(None, Level.PROBLEM), ({"model": "m", "python": "python3"}, Level.WARNING)],
    ids=["workers run elsewhere", "up starts all"],
)
def test_missing_secret_is_a_problem_unless_up_can_make_one(
    write_policy: WritePolicy,
    monkeypatch: pytest.MonkeyPatch,
    launch: dict[str, Any] | None,
    level: Level,
) -> None:
    monkeypatch.delenv("DISAGG_SECRET")
    found = by_subject(EnvironmentCheck().run(context(write_policy(launch=launch))))["secret"]
    assert found.level is level
    assert "openssl rand" in found.fix


def test_secret_that_is_too_short_is_a_problem_even_where_up_could_make_one(
    write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "short")
    path = write_policy(launch={"model": "m"})
    found = by_subject(EnvironmentCheck().run(context(path)))["secret"]
    assert found.level is Level.PROBLEM
    assert found.detail == (
        "the environment variable DISAGG_SECRET holds 5 bytes, a secret needs at least 16"
    )
    assert "unset DISAGG_SECRET: `disagg up` then makes one for its own run" in found.fix


def test_too_few_open_files_are_a_warning_with_the_number_needed(
    write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = by_subject(EnvironmentCheck().run(context(write_policy())))["open files"]
    assert found.level is Level.WARNING
    assert found.fix.startswith("ulimit -n 12288")


def test_staging_beyond_the_memory_is_a_warning(write_policy: WritePolicy) -> None:
    path = write_policy(launch={"model": "m"}, handoff={"staging_bytes": 1 << 50})
    found = by_subject(EnvironmentCheck().run(context(path)))["memory"]
    assert found.level is Level.WARNING


def test_gateway_port_that_another_program_has_is_a_problem(write_policy: WritePolicy) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            path = write_policy(gateway={"port": other.server_address[1]})
            found = by_subject(EnvironmentCheck().run(context(path)))["gateway"]
        finally:
            other.shutdown()
            thread.join()
    assert found.level is Level.PROBLEM
    assert "not this project's gateway" in found.detail


def test_plugin_that_could_not_be_loaded_is_a_problem() -> None:
    findings = EnvironmentCheck().run(CheckContext(plugin_failures=("plugin 'x': broken",)))
    assert by_subject(findings)["plugin"].level is Level.PROBLEM


def test_workers_that_run_are_right(write_policy: WritePolicy) -> None:
    with FakeEngine() as p0, FakeEngine() as d0:
        findings = WorkersCheck().run(context(write_policy((p0.url, d0.url))))
    assert [f.level for f in findings] == [Level.OK, Level.OK]
    assert "serves fake-model" in findings[0].detail


def test_two_models_in_one_fleet_are_a_problem_that_names_both(write_policy: WritePolicy) -> None:
    with FakeEngine() as p0, FakeEngine(model="other") as d0:
        findings = by_subject(WorkersCheck().run(context(write_policy((p0.url, d0.url)))))
    assert findings["fleet"].level is Level.PROBLEM
    assert "fake-model: p0; other: d0" in findings["fleet"].detail


def test_workers_that_do_not_run_are_started_by_up_or_by_hand(write_policy: WritePolicy) -> None:
    by_hand = WorkersCheck().run(context(write_policy()))
    assert [f.level for f in by_hand] == [Level.WARNING, Level.WARNING]
    started = WorkersCheck().run(context(write_policy(launch={"model": "m"})))
    assert [f.level for f in started] == [Level.OK, Level.OK]


def test_engine_that_no_plugin_speaks_to_is_a_problem(write_policy: WritePolicy) -> None:
    findings = WorkersCheck().run(context(write_policy(), engines=frozenset({"other"})))
    assert {f.level for f in findings} == {Level.PROBLEM}
    assert "no plugin speaks to the engine 'vllm' (known: other)" in findings[0].detail


def test_worker_that_serves_another_model_than_the_policy_is_a_problem(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    with FakeEngine(model="other") as p0, FakeEngine(model="other") as d0:
        path = write_policy((p0.url, d0.url), model="mine")
        done = disagg("doctor", path, env={"DISAGG_SECRET": "0123456789abcdef-for-tests"})
    assert done.returncode == 1
    assert "serves other, the policy's model is mine" in done.stdout
    assert "--served-model-name mine" in done.stdout
