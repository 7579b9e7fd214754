from __future__ import annotations

import dataclasses
import resource
import sys
from pathlib import Path
from typing import Any

import pytest

import disagg_plugins.cli.engine_check
from disagg_plugins import __version__
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer, ask
from disagg_plugins.policy import Policy
from disagg_sglang import plugin
from disagg_sglang.checks import SglangCheck
from disagg_sglang.patches import CREATE_SENDER, HOOKED

REAL = Path(__file__).resolve().parents[3] / ".venvs" / "sglang" / "bin" / "python"

GOOD = Answer(
    versions={"sglang": "0.5.23", "torch": "2.14.1", "disagg-plugins": __version__},
    installed=True,
    missing=(),
    entry_point=True,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep out what the shell of whoever runs the tests says to SGLang."""
    for name in ("SGLANG_PLUGINS", "DISAGG_POLICY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every interpreter have all that is needed."""
    monkeypatch.setattr(disagg_plugins.cli.engine_check, "ask", lambda *_: GOOD)


def changed(versions: dict[str, str | None] | None = None, **changes: Any) -> Answer:
    merged = {**GOOD.versions, **(versions or {})}
    return dataclasses.replace(GOOD, versions=merged, **changes)


def judge(answer: Answer, plugins: str | None = None) -> list[Finding]:
    env = {} if plugins is None else {"SGLANG_PLUGINS": plugins}
    return list(SglangCheck().judge("py", answer, env))


def test_environment_that_is_ready_has_no_problem() -> None:
    findings = judge(GOOD)
    assert [f.level for f in findings] == [Level.OK, Level.OK]
    assert findings[0].detail == "sglang 0.5.23 with torch 2.14.1 in py"
    assert "found by SGLang" in findings[1].detail


@pytest.mark.parametrize(
    ("answer", "plugins", "said", "fix"),
    [
        (changed(installed=False), None, "not installed for py", "pip install --python py sglang"),
        (changed(missing=(CREATE_SENDER,)), None, CREATE_SENDER, "sglang==0.5.23"),
        (changed({"torch": None}), None, "importing SGLang fails", "--python py torch"),
        (
            changed({"disagg-plugins": None}),
            None,
            "disagg-plugins is not installed",
            "pip install --python py disagg-plugins",
        ),
        (changed(entry_point=False), None, "no entry point in sglang.srt.plugins", "--reinstall"),
        (GOOD, "other", "SGLANG_PLUGINS='other'", "add disagg_plugins to SGLANG_PLUGINS"),
        (GOOD, ",", "SGLANG_PLUGINS=','", "add disagg_plugins to SGLANG_PLUGINS"),
    ],
)
def test_each_thing_that_is_wrong_is_a_problem_with_its_fix(
    answer: Answer, plugins: str | None, said: str, fix: str
) -> None:
    problems = [f for f in judge(answer, plugins) if f.level is Level.PROBLEM]
    assert len(problems) == 1
    assert said in problems[0].detail
    assert fix in problems[0].fix


def test_another_version_of_this_package_is_a_warning() -> None:
    findings = judge(changed({"disagg-plugins": "0.0.1"}))
    assert [f.level for f in findings] == [Level.OK, Level.WARNING]


@pytest.mark.parametrize("plugins", ["", "other, disagg_plugins"])
def test_list_of_plugins_is_read_as_sglang_reads_it(plugins: str) -> None:
    assert {f.level for f in judge(GOOD, plugins)} == {Level.OK}


def policy_with(role: str = "prefill", **launch: Any) -> Policy:
    worker = {
        "name": "p0",
        "url": "http://127.0.0.1:8101",
        "engine": "sglang",
        "role": role,
        "launch": {"model": "org/model", "python": sys.executable, **launch},
    }
    of_vllm = {**worker, "name": "v0", "url": "http://127.0.0.1:8102", "engine": "vllm"}
    other = {
        **worker,
        "name": "d0",
        "url": "http://127.0.0.1:8103",
        "role": "decode" if role == "prefill" else role,
    }
    return Policy.model_validate({"fleet": {"workers": [worker, of_vllm, other]}})


def run(tmp_path: Path, policy: Policy) -> list[Finding]:
    path = tmp_path / "disagg.yaml"
    path.touch()
    return list(SglangCheck().run(CheckContext(policy, path)))


@pytest.mark.usefixtures("good")
def test_ready_fleet_is_told_in_three_lines(tmp_path: Path) -> None:
    findings = run(tmp_path, policy_with())
    assert [f.subject for f in findings] == ["sglang", "transfer backend", "policy of workers"]
    assert {f.level for f in findings} == {Level.OK}
    assert f"sets DISAGG_POLICY to {tmp_path / 'disagg.yaml'}" in findings[-1].detail


@pytest.mark.usefixtures("good")
def test_list_of_plugins_in_the_launch_section_counts(tmp_path: Path) -> None:
    findings = run(tmp_path, policy_with(env={"SGLANG_PLUGINS": "smg-zmq"}))
    assert [f.subject for f in findings if f.level is Level.PROBLEM] == ["transfer backend"]


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("file", "level"),
    [("", Level.PROBLEM), ("gone.yaml", Level.PROBLEM), ("other.yaml", Level.WARNING)],
)
def test_launch_section_that_names_another_policy_is_found(
    tmp_path: Path, file: str, level: Level
) -> None:
    (tmp_path / "other.yaml").touch()
    given = str(tmp_path / file) if file else ""
    findings = run(tmp_path, policy_with(env={"DISAGG_POLICY": given}))
    found = {f.subject: f for f in findings if f.level is not Level.OK}
    assert set(found) == {"policy of p0", "policy of d0"}
    assert {f.level for f in found.values()} == {level}
    assert all("launch.env" in f.fix for f in found.values())


@pytest.mark.usefixtures("good")
def test_launch_section_that_names_this_policy_is_right(tmp_path: Path) -> None:
    given = str(tmp_path / "." / "disagg.yaml")
    findings = run(tmp_path, policy_with(env={"DISAGG_POLICY": given}))
    assert {f.level for f in findings} == {Level.OK}


@pytest.mark.usefixtures("good")
def test_whole_worker_needs_no_policy(tmp_path: Path) -> None:
    findings = run(tmp_path, policy_with("both", env={"DISAGG_POLICY": "gone.yaml"}))
    assert {f.subject for f in findings} == {"sglang", "transfer backend"}


def test_missing_interpreter_and_model_are_found_together(tmp_path: Path) -> None:
    findings = run(tmp_path, policy_with(python="no/python", model="./no-model"))
    problems = {f.subject for f in findings if f.level is Level.PROBLEM and f.fix}
    assert problems == {
        "interpreter of p0",
        "model of p0",
        "interpreter of d0",
        "model of d0",
    }


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("given", "level"),
    [
        (None, Level.WARNING),
        ("", Level.WARNING),
        ("gone.yaml", Level.PROBLEM),
        ("disagg.yaml", Level.OK),
    ],
)
def test_without_a_policy_the_shell_must_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, level: Level
) -> None:
    (tmp_path / "disagg.yaml").touch()
    if given is not None:
        monkeypatch.setenv("DISAGG_POLICY", str(tmp_path / given) if given else "")
    finding = SglangCheck().run(CheckContext())[-1]
    assert (finding.subject, finding.level) == ("policy", level)
    assert bool(finding.fix) == (level is not Level.OK)


def test_without_a_policy_a_missing_engine_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disagg_plugins.cli.engine_check, "ask", lambda *_: changed(installed=False))
    assert [f.level for f in SglangCheck().run(CheckContext())] == [Level.WARNING]


def test_plugin_offers_the_check() -> None:
    assert [c.name for c in plugin.disagg_register_checks()] == ["sglang"]


def test_every_hooked_name_is_asked_for() -> None:
    assert set(HOOKED) <= set(SglangCheck.question.paths)


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(not REAL.exists(), reason="there is no .venvs/sglang (`make sglang`)")
def test_real_sglang_has_every_name_and_is_not_imported() -> None:
    before_s = children_cpu_s()
    answer = ask(SglangCheck.question, str(REAL), {})
    assert children_cpu_s() - before_s < 10.0, "importing SGLang takes 50 s of CPU time"
    assert answer.installed
    assert answer.missing == ()
    assert answer.entry_point
    assert Level.PROBLEM not in {f.level for f in judge(answer)}
