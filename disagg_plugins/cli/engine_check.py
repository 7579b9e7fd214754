"""What doctor's checks of engines share: they ask each worker's interpreter what it has.

Imports no engine. The environment of a worker is usually not the one that doctor runs in, so each
interpreter that the policy names is asked by a short script. The script reads metadata and source
files only: importing an engine takes ten seconds and more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins import __version__
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.programs import find_python

if TYPE_CHECKING:
    from disagg_plugins.policy import WorkerPolicy

PROBE_S = 30.0
"""Reading metadata takes 0.1 s; a cold disk on a busy machine takes far longer."""

OURS = "disagg-plugins"
ENTRY_POINT = "disagg_plugins"
"""The name of this project's entry point in the group of every engine."""

PROBE = r"""
import importlib.metadata as metadata, importlib.util, json, pathlib, re, sys
asked = json.loads(sys.argv[1])
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
def is_there(path):
    place, names = folder, path.split(".")[1:]
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    file = place / "__init__.py"
    if names and (place / (names[0] + ".py")).is_file():
        file = place / (names.pop(0) + ".py")
    text = file.read_text("utf-8", "replace") if names and file.is_file() else ""
    defined = r"^\s*(?:(?:async def|def|class) %s\b|%s\s*:)"
    return all(re.search(defined % (name, name), text, re.M) for name in names)
spec = importlib.util.find_spec(asked["package"])
folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
points = metadata.entry_points(group=asked["group"])
print(json.dumps({
    "versions": {name: version(name) for name in asked["distributions"]},
    "installed": folder is not None,
    "missing": [path for path in asked["paths"] if folder is None or not is_there(path)],
    "entry_point": any(point.name == asked["entry_point"] for point in points),
}))
"""


@dataclass(frozen=True, slots=True)
class Question:
    """What an interpreter is asked.

    Attributes:
        package: The engine's import package.
        group: The group of entry points in which the engine looks for plugins.
        distributions: Whose versions are wanted, beside this project's.
        paths: Dotted paths in ``package`` that the adapter needs: modules, or names that are
            defined in a module by ``def`` or ``class``, or as an annotated field.
    """

    package: str
    group: str
    distributions: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an interpreter has.

    Attributes:
        versions: By distribution; None: not installed.
        installed: Whether the engine's package is there.
        missing: Those of the question's paths that are not there.
        entry_point: Whether this project's entry point is in the engine's group.
    """

    versions: dict[str, str | None]
    installed: bool
    missing: tuple[str, ...]
    entry_point: bool


def ask(question: Question, python: str, env: Mapping[str, str]) -> Answer:
    """Return what ``python`` has when it runs with ``env`` beside this environment.

    Raises:
        ConfigError: The interpreter does not run or does not answer within ``PROBE_S``.
    """
    asked = {
        "package": question.package,
        "group": question.group,
        "distributions": [*question.distributions, OURS],
        "paths": question.paths,
        "entry_point": ENTRY_POINT,
    }
    try:
        done = subprocess.run(
            # -P: a folder named like a package, where doctor happens to run, must not hide it.
            [python, "-P", "-c", PROBE, json.dumps(asked)],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            env={**os.environ, **env},
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=Answer)
    except subprocess.CalledProcessError as exc:
        last = (exc.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{python} cannot tell what it has: {last}") from exc
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        raise ConfigError(f"{python} cannot tell what it has: {exc}") from exc


def judge_plugin(
    python: str,
    answer: Answer,
    question: Question,
    *,
    subject: str,
    engine: str,
    barred: Finding | None,
) -> Finding:
    """Return whether the engine finds this project's plugin, and whether its version is ours.

    Args:
        python: The interpreter.
        answer: What it has.
        question: What it was asked.
        subject: What the plugin is to the engine.
        engine: The engine's name as its makers write it.
        barred: What to say of an engine that is told to load other plugins only; None: it is not.
    """
    ours = answer.versions[OURS]
    install = f"uv pip install --python {python} {OURS}"
    if ours is None:
        detail = f"disagg-plugins is not installed for {python}"
        return Finding(Level.PROBLEM, subject, detail, install)
    if not answer.entry_point:
        detail = f"{OURS} {ours} has no entry point in {question.group}"
        return Finding(Level.PROBLEM, subject, detail, f"{install} --reinstall")
    if barred is not None:
        return barred
    if ours != __version__:
        detail = f"the worker has {OURS} {ours}, this side has {__version__}"
        return Finding(Level.WARNING, subject, detail, f"{install}=={__version__}")
    return Finding(Level.OK, subject, f"{OURS} {ours}, found by {engine}")


def judge_model(worker: WorkerPolicy, base: Path) -> Iterator[Finding]:
    """Yield a problem if the worker's model is given as a path to what is none."""
    model = worker.launch.model if worker.launch else ""
    if model.startswith((".", "/", "~")):
        path = base / os.path.expanduser(model)
        if not (path / "config.json").is_file():
            yield Finding(
                Level.PROBLEM,
                f"model of {worker.name}",
                f"{path} is not the folder of a model (it has no config.json)",
                "correct launch.model; it is relative to the policy file",
            )


class EngineCheck(ABC):
    """Asks each interpreter that starts a worker of one engine; without a policy, this one."""

    name: str
    """The engine's name in a policy, and of its group in doctor's report."""

    question: Question

    @abstractmethod
    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield what is right and wrong with one environment.

        Args:
            python: Its interpreter.
            answer: What it has.
            env: The environment variables of the worker.
        """

    def judge_worker(self, worker: WorkerPolicy, policy_path: Path) -> Iterator[Finding]:
        """Yield what is right and wrong with what the policy says of one worker."""
        yield from judge_model(worker, policy_path.parent)

    def judge_shell(self, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield what is right and wrong for a server that is started by hand with ``env``."""
        yield from ()

    def run(self, context: CheckContext) -> Sequence[Finding]:
        """Return the findings, one group of them for each interpreter."""
        if context.policy is None or context.policy_path is None:
            return list(self.without_policy(context))
        findings: list[Finding] = []
        asked: list[tuple[str, Mapping[str, str]]] = []
        for worker in context.policy.fleet.workers:
            if worker.engine != self.name or worker.launch is None:
                continue
            env = worker.launch.env
            try:
                python = find_python(worker.launch, context.policy_path.parent, worker=worker.name)
                if (python, env) not in asked:
                    asked.append((python, env))
                    answer = ask(self.question, python, env)
                    findings += self.judge(python, answer, {**os.environ, **env})
            except ConfigError as problem:
                subject = f"interpreter of {worker.name}"
                fix = problem.fix or "correct launch.python"
                findings.append(Finding(Level.PROBLEM, subject, problem.problem, fix))
            findings += self.judge_worker(worker, context.policy_path)
        return list(dict.fromkeys(findings))

    def without_policy(self, context: CheckContext) -> Iterator[Finding]:
        """Yield what there is to say of this environment, where no policy names workers."""
        answer = ask(self.question, sys.executable, {})
        if answer.installed:
            yield from self.judge(sys.executable, answer, os.environ)
            yield from self.judge_shell(os.environ)
        # Two engines seldom share an environment: beside one, nobody misses the other.
        elif not any(_is_here(other) for other in context.engines - {self.name}):
            yield Finding(
                Level.WARNING,
                self.name,
                f"not installed for {sys.executable}",
                "none needed if workers run elsewhere: run `disagg doctor` with their Python",
            )


def _is_here(package: str) -> bool:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    return spec is not None and spec.origin is not None
