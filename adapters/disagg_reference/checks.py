"""What ``disagg doctor`` asks about the reference engine: does its environment have all it needs?

Imports no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer, EngineCheck, Question

NEEDED = ("aiohttp", "safetensors", "tokenizers", "torch")


class ReferenceCheck(EngineCheck):
    """Asks each interpreter that starts a worker of the reference engine."""

    name = "reference"
    question = Question(
        package="disagg_reference", group="disagg_plugins", distributions=NEEDED, paths=()
    )

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield whether the engine and what it needs are there."""
        missing = [name for name in NEEDED if answer.versions[name] is None]
        if not answer.installed:
            missing.insert(0, "disagg-plugins")
        if missing:
            yield Finding(
                Level.PROBLEM,
                self.name,
                f"{python} has no {', '.join(missing)}",
                f"uv pip install --python {python} 'disagg-plugins[reference]'",
            )
            return
        yield Finding(Level.OK, self.name, f"torch {answer.versions['torch']} in {python}")

    def without_policy(self, context: CheckContext) -> Iterator[Finding]:
        """Yield nothing: nobody misses an engine for demonstrations and tests."""
        return iter(())
