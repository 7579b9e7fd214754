"""What ``disagg doctor`` asks: checks give findings, and a finding that is bad names its fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy
    from disagg_plugins.policy_pairs import EnginePairs


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a check found.

    Attributes:
        level: How bad it is; a problem makes ``disagg doctor`` exit with 1.
        subject: What it is about, in a few words.
        detail: What was found, with the values.
        fix: What to do; every warning and problem has one.
    """

    level: Level
    subject: str
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class CheckContext:
    """What a check may look at.

    Attributes:
        policy: The policy, or None when doctor was asked about the environment alone.
        policy_path: The absolute path of its file.
        engines: Engines that some plugin speaks to.
        plugin_failures: What could not be loaded, in words.
        own_transport: Those of them that carry their handoffs themselves.
        pairs: What the engines make of the fleet's pairs; None where nothing is to be split.
        unknown_names: What the policy names and no plugin offers, in words.
    """

    policy: Policy | None = None
    policy_path: Path | None = None
    engines: frozenset[str] = frozenset()
    plugin_failures: tuple[str, ...] = ()
    unknown_names: tuple[str, ...] = ()
    own_transport: frozenset[str] = frozenset()
    pairs: EnginePairs | None = None


class Check(Protocol):
    """One group of questions about this machine; offered by ``disagg_register_checks``."""

    name: str
    """Names the group in the report; unique among checks."""

    def run(self, context: CheckContext) -> Sequence[Finding]:
        """Return what was found; waits are bounded by the check itself."""
        ...


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level among ``findings``; ok when there are none."""
    order = list(Level)
    return max((f.level for f in findings), key=order.index, default=Level.OK)


def render(title: str, findings: Iterable[Finding]) -> str:
    """Return the findings of one group as lines of text."""
    signs = {Level.OK: "ok     ", Level.WARNING: "warning", Level.PROBLEM: "PROBLEM"}
    lines = [title]
    for finding in findings:
        lines.append(f"  {signs[finding.level]}  {finding.subject}: {finding.detail}")
        if finding.fix:
            lines.append(f"           fix: {finding.fix}")
    return "\n".join(lines)
