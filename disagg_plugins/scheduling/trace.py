"""What was asked on the way to a decision, and what each plugin answered.

Notes hold the plugins' own answers and are turned into plain values only when somebody asks why a
request went where it went, so that keeping them costs a decision next to nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from disagg_plugins.types import Refusal, SplitDecision

if TYPE_CHECKING:
    from disagg_plugins.types import Role

Answers = Sequence[tuple[str, object]]
"""Plugin names and what they answered."""

MOST_WORKERS = 64
"""Named in one answer that is kept: far more than a decision usually looks at. Where the sample of
a large fleet leaves nobody, every plugin answers for the whole fleet."""

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

    def shorten(self) -> None:
        """Forget most of the answers that are about a whole large fleet."""
        self.steps = [
            (step, role, [(plugin, _short(answer)) for plugin, answer in answers])
            if any(_is_long(answer) for _, answer in answers)
            else (step, role, answers)
            for step, role, answers in self.steps
        ]

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


def _is_long(answer: object) -> bool:
    return isinstance(answer, (Mapping, set, Sequence)) and len(answer) > MOST_WORKERS


def _short(answer: object) -> object:
    """Return a long answer with its best workers, or with some and how many there are."""
    if not _is_long(answer) or isinstance(answer, str):
        return answer
    if isinstance(answer, Mapping):
        return dict(heapq.nlargest(MOST_WORKERS, answer.items(), key=lambda each: each[1]))
    if isinstance(answer, (set, Sequence)):
        some = sorted(map(str, answer))[:MOST_WORKERS]
        return [*some, f"and {len(answer) - len(some)} more"]
    return answer


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
