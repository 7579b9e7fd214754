"""The doctor says what the reference engine's environment lacks, and how to add it."""

from __future__ import annotations

import sys

import pytest

from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.engine_check import Answer
from disagg_reference.checks import NEEDED, ReferenceCheck


def judge(*, installed: bool = True, **versions: str | None) -> Finding:
    answer = Answer(
        versions={**dict.fromkeys(NEEDED, "1.0"), **versions},
        installed=installed,
        missing=(),
        entry_point=True,
    )
    (finding,) = ReferenceCheck().judge("py", answer, {})
    return finding


def test_an_environment_that_has_all_is_right() -> None:
    finding = judge(torch="2.13.0")
    assert (finding.level, finding.detail) == (Level.OK, "torch 2.13.0 in py")


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_policy_the_engine_is_named_and_nobody_has_to_have_it(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    versions = dict.fromkeys(NEEDED, "1.0") | ({} if installed else {"torch": None})
    answer = Answer(versions=versions, installed=True, missing=(), entry_point=True)
    monkeypatch.setattr("disagg_reference.checks.ask", lambda *_: answer)
    (finding,) = ReferenceCheck().run(CheckContext())
    assert (finding.level, finding.subject) == (Level.OK, "reference")
    if installed:
        assert finding.detail == f"torch 1.0 in {sys.executable}"
    else:
        assert "has no torch: `disagg demo` needs it" in finding.detail
        assert "disagg-plugins[reference]" in finding.detail


def test_what_is_missing_is_named_with_the_way_to_add_it() -> None:
    finding = judge(installed=False, torch=None, tokenizers=None)
    assert finding.level is Level.PROBLEM
    assert "py has no disagg-plugins, tokenizers, torch" in finding.detail
    assert finding.fix == "uv pip install --python py 'disagg-plugins[reference]'"
