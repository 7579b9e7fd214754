"""The doctor says what the reference engine's environment lacks, and how to add it."""

from __future__ import annotations

from disagg_plugins.cli.checks import Finding, Level
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


def test_what_is_missing_is_named_with_the_way_to_add_it() -> None:
    finding = judge(installed=False, torch=None, tokenizers=None)
    assert finding.level is Level.PROBLEM
    assert "py has no disagg-plugins, tokenizers, torch" in finding.detail
    assert finding.fix == "uv pip install --python py 'disagg-plugins[reference]'"
