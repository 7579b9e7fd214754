"""Doctor reads the installed sources: both known eras, and what is neither."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.engine_check import ask
from disagg_trtllm.checks import ERAS, NOT_RUN, OUTPUT, REQUEST, SCHEDULER, WORKER, TrtllmCheck

ARGS = """
class KvCacheConnectorConfig(StrictBaseModel):
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str
"""


def interface() -> str:
    def body(names: tuple[str, ...]) -> str:
        return "\n".join(f"    def {name}(self): ..." for name in names)

    def fields(names: tuple[str, ...]) -> str:
        return "\n".join(f"    {name}: object" for name in names)

    return (
        f"class RequestData:\n{fields(REQUEST)}\n\nclass SchedulerOutput:\n{fields(OUTPUT)}\n\n"
        f"class KvCacheConnectorWorker(ABC):\n{body(WORKER)}\n\n"
        f"class KvCacheConnectorScheduler(ABC):\n{body(SCHEDULER)}\n"
    )


Install = Callable[..., list[Finding]]


@pytest.fixture
def doctor(tmp_path: Path) -> Install:
    """Return what writes a package and asks this interpreter about it."""

    def judge(module: str, text: str, args: str = ARGS) -> list[Finding]:
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True)
        path.write_text(text)
        (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise SystemExit('imported')")
        llm_args = tmp_path / "tensorrt_llm" / "llmapi" / "llm_args.py"
        llm_args.parent.mkdir()
        llm_args.write_text(args)
        check = TrtllmCheck()
        answer = ask(check.question, sys.executable, {"PYTHONPATH": str(tmp_path)})
        return list(check.judge("py", answer, {}))

    return judge


@pytest.mark.parametrize("era", ERAS)
def test_a_known_era_is_named_and_that_nothing_was_run_here_is_said(doctor, era: str) -> None:
    first, *_, last = doctor(ERAS[era], interface())
    assert (first.level, first.subject) == (Level.OK, "interface")
    assert f"{era}-era, every field" in first.detail
    assert NOT_RUN in last.detail


@pytest.mark.parametrize("name", ["start_load_kv", "update_state_after_alloc", "computed_position"])
def test_what_an_interface_lacks_is_named_field_by_field(doctor, name: str) -> None:
    first, *_ = doctor(ERAS["main"], interface().replace(f" {name}", " other"))
    assert first.level is Level.PROBLEM
    assert f"of the nearest (main) it lacks {name}" in first.detail
    assert "trtllm-native" in first.fix


def test_options_without_a_way_to_name_a_connector_are_a_warning(doctor) -> None:
    findings = doctor(ERAS["1.2"], interface(), args="class Other: ...")
    (warning,) = [f for f in findings if f.level is Level.WARNING]
    assert "connector_module" in warning.detail


def test_a_missing_package_is_a_problem_that_says_where_to_ask() -> None:
    check = TrtllmCheck()
    answer = ask(check.question, sys.executable, {})
    (finding,) = check.judge("py", answer, {})
    assert (finding.level, finding.detail) == (Level.PROBLEM, "not installed for py")
