"""``disagg canary`` against a running gateway, and without one."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from disagg_plugins.cli.canary import lines
from disagg_plugins.cli.main import main
from tests.canary.hand_made import made_document
from tests.canary.side_by_side import build_side_by_side
from tests.gateway.harness import SECRET


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    with ExitStack() as stack:
        yield partial(build_side_by_side, stack, tmp_path)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    return str(tmp_path / "baseline.yaml")


def test_a_rollout_is_started_held_resumed_and_rolled_back(arms, policy, capsys) -> None:
    site = arms(canary={"bake_s": 3600})
    for words, phase in (
        (["start"], "running"),
        (["hold", "--why", "lunch"], "held"),
        (["resume"], "running"),
        (["rollback", "--why", "enough", "--by", "bob"], "aborted"),
    ):
        assert main(["canary", words[0], policy, *words[1:]]) == 0
        assert capsys.readouterr().out.startswith(phase)
    assert site.front.lookout.view.weight == 0
    assert main(["canary", "status", policy]) == 0
    told = capsys.readouterr().out
    assert "abort by bob, 50 % to 0 %: enough" in told
    assert "hold by" in told


def test_answers_that_prefill_ended_are_told_apart() -> None:
    told = "\n".join(lines(made_document()))
    assert "of the last ones 40 split and 39 really so, 1 ended by prefill" in told


def test_what_is_not_allowed_now_exits_with_1_and_says_why(arms, policy, capsys) -> None:
    arms()
    assert main(["canary", "approve", policy]) == 1
    assert "the rollout is pending" in capsys.readouterr().err


def test_without_a_gateway_a_rollback_is_written_and_a_start_is_not(arms, policy, capsys) -> None:
    site = arms(canary={"bake_s": 3600})
    site.command("start")
    site.wait_weight(50)
    site.stop()
    assert main(["canary", "resume", policy]) == 1
    assert main(["canary", "rollback", policy, "--why", "no gateway"]) == 0
    assert main(["canary", "status", policy]) == 0
    assert capsys.readouterr().out.startswith("aborted")


def test_a_link_and_an_override_are_good_for_the_running_gateway(arms, policy, capsys) -> None:
    site = arms()
    assert main(["canary", "page", policy]) == 0
    token = re.fullmatch(r"http://\S+/canary#token=(\S+)\n", capsys.readouterr().out)
    assert token
    found = site.document({"Authorization": f"Bearer {token[1]}"})
    assert found["may_act"] is True
    assert main(["canary", "override", policy, "candidate"]) == 0
    name, _, value = capsys.readouterr().out.strip().partition(": ")
    body = {"model": "fake-model", "prompt": "hello", "max_tokens": 2}
    assert site.request("POST", "/v1/completions", body, {name: value})[0] == 200
    assert site.metric("disagg_canary_requests", ("candidate", "override")) == 1


def test_a_policy_without_a_canary_is_told(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    path = tmp_path / "plain.yaml"
    path.write_text("fleet: {workers: [{name: w, url: 'http://127.0.0.1:9001', role: both}]}\n")
    assert main(["canary", "status", str(path)]) == 2
    assert "the policy has no canary" in capsys.readouterr().err
