"""The short form of ``make chaos``: fixed seeds, real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import Plan, report, run

pytestmark = pytest.mark.fleet
PLAN = Plan(seed=11, requests=240, seconds=4.0, prefills=2, decodes=3, gateways=2, gap_s=0.3)


def test_every_request_ends_right_or_with_a_clear_error_and_nothing_is_left(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run(PLAN, tmp_path, lines.append)
    report(result, lines.append)
    assert not result.failed, "\n".join([*lines, str(result.line())])
    assert sum(result.verdicts.values()) == PLAN.requests
    assert result.verdicts["right"] >= PLAN.requests // 2
    assert result.faults
    assert result.split
