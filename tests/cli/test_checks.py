from __future__ import annotations

from disagg_plugins.cli.checks import Finding, Level, render, worst


def test_worst_of_nothing_is_ok() -> None:
    assert worst([]) is Level.OK


def test_worst_level_wins() -> None:
    levels = (Level.WARNING, Level.PROBLEM, Level.OK)
    assert worst(Finding(level, "s", "d") for level in levels) is Level.PROBLEM


def test_findings_are_shown_with_their_fix() -> None:
    findings = [Finding(Level.OK, "a", "fine"), Finding(Level.PROBLEM, "b", "broken", "mend it")]
    assert render("group", findings).splitlines() == [
        "group",
        "  ok       a: fine",
        "  PROBLEM  b: broken",
        "           fix: mend it",
    ]
