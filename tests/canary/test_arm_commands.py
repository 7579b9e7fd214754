"""``--arm``: whose fleet ``disagg fleet``, ``top`` and ``doctor --live`` are about."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from disagg_plugins.cli import live
from disagg_plugins.cli.main import main
from tests.gateway.harness import SECRET, build_stack

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    monkeypatch.setattr(live, "SETTLED_S", 0.0)  # pretend workers never introduce themselves

    def command(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(argv))
        printed = capsys.readouterr()
        return code, printed.out or printed.err

    return command


def test_the_candidates_fleet_is_listed_and_changed_and_the_baselines_is_not(
    arms, run: Run, tmp_path: Path
) -> None:
    site = arms(b0="both", c0="both", c1="both")
    policy = str(tmp_path / "baseline.yaml")
    assert [line.split()[0] for line in run("fleet", "list", policy)[1].splitlines()] == ["b0"]
    _, listed = run("fleet", "list", policy, "--arm", "candidate")
    assert [line.split()[0] for line in listed.splitlines()] == ["c0", "c1"]
    assert run("fleet", "drain", policy, "c1", "--arm", "candidate")[0] == 0
    assert site.front.candidate.fleet.states["c1"].draining
    code, text = run("fleet", "drain", policy, "c1")
    assert code != 0
    assert "c1" in text


def test_top_and_doctor_look_at_the_arm_that_is_named(arms, run: Run) -> None:
    site = arms()
    url = f"http://127.0.0.1:{site.port}"
    for arm, there, away in (("baseline", "b0", "c0"), ("candidate", "c0", "b0")):
        code, text = run("top", "--once", "--gateway", url, "--arm", arm)
        assert (code, there in text, away in text) == (0, True, False)
        _, text = run("doctor", "--live", url, "--arm", arm)
        assert (there in text, away in text) == (True, False)


def test_a_gateway_without_a_canary_does_not_pass_for_an_arm(run: Run, tmp_path: Path) -> None:
    with ExitStack() as stack:
        site = build_stack(stack, tmp_path, d0="both")
        url = f"http://127.0.0.1:{site.port}"
        worker = {"name": "d0", "url": site.engines["d0"].url, "role": "both"}
        policy = str(tmp_path / "policy.yaml")
        Path(policy).write_text(yaml.safe_dump({"fleet": {"workers": [worker]}}))
        for argv in (
            ("fleet", "drain", policy, "d0", "--gateway", url),
            ("top", "--once", "--gateway", url),
            ("doctor", "--live", url),
        ):
            code, text = run(*argv, "--arm", "candidate")
            assert code != 0
            assert "this gateway has no candidate" in text
        assert not site.gateway.fleet.states["d0"].draining
