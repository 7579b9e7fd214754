from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import disagg_plugins.cli.engine_check
from disagg_plugins import __version__
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer, EngineCheck, Question, ask, judge_plugin
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import Policy

SOURCE = """
raise RuntimeError("an engine was imported")

class Queue(Base):
    def make(self):
        made = 1

    async def wait(self): ...

def get_class(
"""
"""No Python in the end: nothing but the lines of definitions is looked at."""


@pytest.fixture
def engine(tmp_path: Path) -> dict[str, str]:
    """Return an environment that has a package ``engine`` and an entry point for it."""
    folder = tmp_path / "engine" / "srt"
    folder.mkdir(parents=True)
    (tmp_path / "engine" / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "__init__.py").write_text("def load(): ...\n")
    (folder / "queue.py").write_text(SOURCE)
    info = tmp_path / "engine_plugin-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-plugin\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[engine.plugins]\ndisagg_plugins = no.module:f\n")
    return {"PYTHONPATH": str(tmp_path)}


def question(*paths: str, package: str = "engine", group: str = "engine.plugins") -> Question:
    return Question(package, group, ("engine-plugin", "torch-of-nobody"), paths)


def test_versions_and_the_entry_point_are_read_from_metadata(engine: dict[str, str]) -> None:
    answer = ask(question(), sys.executable, engine)
    assert answer.versions["engine-plugin"] == "1.5"
    assert answer.versions["torch-of-nobody"] is None
    assert answer.installed
    assert answer.entry_point
    assert not ask(question(group="other.plugins"), sys.executable, engine).entry_point


@pytest.mark.parametrize(
    "path",
    [
        "engine",
        "engine.srt",
        "engine.srt.load",
        "engine.srt.queue",
        "engine.srt.queue.Queue",
        "engine.srt.queue.Queue.make",
        "engine.srt.queue.Queue.wait",
        "engine.srt.queue.get_class",
    ],
)
def test_module_or_name_that_is_defined_is_found(engine: dict[str, str], path: str) -> None:
    assert ask(question(path), sys.executable, engine).missing == ()


@pytest.mark.parametrize(
    "path",
    [
        "engine.gone",
        "engine.srt.gone",
        "engine.srt.gone.Queue",
        "engine.srt.queue.Gone.make",
        "engine.srt.queue.Queue.mak",
        "engine.srt.queue.Queue.made",
        "engine.srt.queue.get",
    ],
)
def test_module_or_name_that_is_not_defined_is_missing(engine: dict[str, str], path: str) -> None:
    assert ask(question(path, "engine.srt"), sys.executable, engine).missing == (path,)


def test_engine_that_is_not_there_lacks_everything(tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    env = {"PYTHONPATH": str(tmp_path)}
    answer = ask(question("absent.a", package="absent"), sys.executable, env)
    assert not answer.installed, "a folder without __init__.py is no engine"
    assert answer.missing == ("absent.a",)


def test_folder_where_doctor_runs_is_not_taken_for_an_engine(
    engine: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine["PYTHONPATH"])
    assert not ask(question(), sys.executable, {}).installed


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/nonexistent", "No such file"),
        ("/bin/false", "no message"),
        ("/bin/echo", "cannot tell what it has"),
    ],
)
def test_interpreter_that_does_not_run_is_an_error_in_words(python: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask(question(), python, {})


@pytest.mark.parametrize(
    ("ours", "entry_point", "level", "said"),
    [
        (None, True, Level.PROBLEM, "is not installed for py"),
        (__version__, False, Level.PROBLEM, "has no entry point in engine.plugins"),
        (__version__, True, Level.PROBLEM, "barred"),
        ("0.0.1", True, Level.PROBLEM, "barred"),
    ],
)
def test_list_of_plugins_matters_only_where_the_plugin_is_there(
    ours: str | None, entry_point: bool, level: Level, said: str
) -> None:
    answer = Answer({"disagg-plugins": ours}, True, (), entry_point)
    barred = Finding(Level.PROBLEM, "plugin", "barred", "free it")
    finding = judge_plugin(
        "py", answer, question(), subject="plugin", engine="Engine", barred=barred
    )
    assert (finding.level, finding.subject) == (level, "plugin")
    assert said in finding.detail
    assert finding.fix


class JsonCheck(EngineCheck):
    """Takes ``json`` for an engine: it is everywhere."""

    name = "json"
    question = Question("json", "json.plugins", (), ())

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        yield Finding(Level.OK, "json", f"A={env.get('A')}")


def run_with(tmp_path: Path, *envs: dict[str, str]) -> list[Finding]:
    workers = [
        {
            "name": f"w{i}",
            "url": f"http://127.0.0.1:{8101 + i}",
            "engine": "json",
            "role": "both",
            "launch": {"model": "org/model", "python": sys.executable, "env": env},
        }
        for i, env in enumerate(envs)
    ]
    policy = Policy.model_validate({"fleet": {"workers": workers}})
    return list(JsonCheck().run(CheckContext(policy, tmp_path / "disagg.yaml")))


def test_interpreter_is_asked_again_for_another_environment(tmp_path: Path) -> None:
    found = run_with(tmp_path, {"A": "1"}, {"A": "2"}, {"A": "1"})
    assert [f.detail for f in found] == ["A=1", "A=2"]


def test_same_finding_is_told_once(tmp_path: Path) -> None:
    assert len(run_with(tmp_path, {"B": "1"}, {"B": "2"})) == 1


def test_without_a_policy_this_interpreter_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "3")
    assert [f.detail for f in JsonCheck().run(CheckContext())] == ["A=3"]


@pytest.mark.parametrize(
    ("engines", "levels"),
    [
        ({"json"}, [Level.WARNING]),
        ({"json", "absent-engine", "absent"}, [Level.WARNING]),
        ({"json", "email"}, []),
    ],
)
def test_missing_engine_is_worth_a_word_unless_another_is_there(
    monkeypatch: pytest.MonkeyPatch, engines: set[str], levels: list[Level]
) -> None:
    nothing = Answer({}, False, (), False)
    monkeypatch.setattr(disagg_plugins.cli.engine_check, "ask", lambda *_: nothing)
    found = JsonCheck().run(CheckContext(engines=frozenset(engines)))
    assert [f.level for f in found] == levels
