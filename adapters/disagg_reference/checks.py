"""What ``disagg doctor`` asks about the reference engine: does its environment have all it needs?

Imports no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer, EngineCheck, Question, ask

NEEDED = ("aiohttp", "safetensors", "tokenizers", "torch")


class ReferenceCheck(EngineCheck):
    """Asks each interpreter that starts a worker of the reference engine."""

    name = "reference"
    question = Question(
        package="disagg_reference", group="disagg_plugins", distributions=NEEDED, paths=()
    )

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield whether the engine and what it needs are there."""
        if missing := _missing(answer):
            yield Finding(
                Level.PROBLEM,
                self.name,
                f"{python} has no {', '.join(missing)}",
                f"uv pip install --python {python} 'disagg-plugins[reference]'",
            )
            return
        yield Finding(Level.OK, self.name, f"torch {answer.versions['torch']} in {python}")

    def without_policy(self, context: CheckContext) -> Iterator[Finding]:
        """Yield whether it is here; nobody has to have an engine for demonstrations and tests."""
        answer = ask(self.question, sys.executable, {})
        missing = _missing(answer)
        if not missing:
            yield from self.judge(sys.executable, answer, {})
            return
        yield Finding(
            Level.OK,
            self.name,
            f"{sys.executable} has no {', '.join(missing)}: `disagg demo` needs it "
            "(pip install 'disagg-plugins[reference]'), nothing else does",
        )


def _missing(answer: Answer) -> list[str]:
    """Return the distributions that an environment lacks."""
    missing = [name for name in NEEDED if answer.versions[name] is None]
    return missing if answer.installed else ["disagg-plugins", *missing]
