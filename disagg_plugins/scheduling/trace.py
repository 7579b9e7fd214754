"""What was asked on the way to a decision, and what each plugin answered.

Notes hold the plugins' own answers and are turned into plain values only when somebody asks why a
request went where it went, so that keeping them costs a decision next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from disagg_plugins.types import Refusal, SplitDecision

if TYPE_CHECKING:
    from disagg_plugins.types import Role

Answers = Sequence[tuple[str, object]]
"""Plugin names and what they answered."""

Plain = dict[str, object]
"""Made of strings, numbers, lists and dictionaries with string keys."""


@dataclass(slots=True)
class Trace:
    """The steps of one decision, in order.

    Attributes:
        steps: (step, role or None, answers); a step is ``admission``, ``split``, ``nominate``,
            ``filter``, ``score``, ``combined``, ``select`` or ``chosen``.
    """

    steps: list[tuple[str, Role | None, Answers]] = field(default_factory=list)

    def note(self, step: str, role: Role | None, answers: Answers) -> None:
        """Add a step."""
        self.steps.append((step, role, answers))

    def plain(self) -> list[Plain]:
        """Return the steps as plain values."""
        return [
            {
                "step": step,
                **({} if role is None else {"role": str(role)}),
                "said": {plugin: _plain(answer) for plugin, answer in answers},
            }
            for step, role, answers in self.steps
        ]


CORE = "core"
"""Stands for a plugin's name where the core itself speaks."""


def _plain(answer: object) -> object:
    if isinstance(answer, SplitDecision):
        return {"split": answer.split, "reason": answer.reason}
    if isinstance(answer, Refusal):
        return {"refused": answer.reason, "retry_after_s": answer.retry_after_s}
    if isinstance(answer, Mapping):
        return {str(k): round(v, 4) if isinstance(v, float) else v for k, v in answer.items()}
    if isinstance(answer, (set, frozenset)):
        return sorted(map(str, answer))
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        return [str(each) for each in answer]
    return answer if isinstance(answer, (str, int, float)) else str(answer)
