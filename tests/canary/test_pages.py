"""The canary over HTTP: who may see it, who may command, and what is answered."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from disagg_plugins.canary.page_token import Tokens
from disagg_plugins.gateway.admin import signed_headers
from tests.gateway.harness import SECRET

PATH = "/internal/canary"
START = json.dumps({"do": "start", "by": "ann", "why": "try it"}).encode()


def bearer(right: str, valid_s: float = 60.0, secret: bytes = SECRET) -> dict[str, str]:
    token = Tokens(secret, "default").mint(right, time.time(), valid_s)
    return {"Authorization": f"Bearer {token}"}


def test_the_document_tells_both_arms_the_plan_and_the_evidence(arms) -> None:
    found = arms().document()
    assert found["progress"]["phase"] == "pending"
    assert found["plan"]["steps"] == [50, 100]
    assert [w["name"] for w in found["arms"]["candidate"]["workers"]] == ["c0"]
    assert [g["name"] for g in found["guardrails"]] == ["error_rate", "error_rate limit"]
    assert found["may_act"] is False
    assert found["trouble"] is None


def test_a_command_without_a_proof_is_refused_even_on_this_host(arms) -> None:
    site = arms()
    for headers in ({}, bearer("see"), bearer("act", secret=b"another secret of 32 bytes......")):
        status, _, body = site.request("POST", PATH, START, headers)
        assert status == 403, body
    assert site.front.lookout.view.progress.phase == "pending"


def test_a_token_that_may_act_commands_and_gets_the_new_state(arms) -> None:
    site = arms()
    status, _, body = site.request("POST", PATH, START, bearer("act"))
    assert status == 200, body
    found = json.loads(body)
    assert found["progress"]["phase"] == "running"
    assert found["may_act"] is True
    assert (found["decisions"][0]["kind"], found["decisions"][0]["by"]) == ("start", "ann")


def test_a_signed_command_is_good_once(arms) -> None:
    site = arms()
    headers = signed_headers(SECRET, "POST", PATH, START, time.time())
    assert site.request("POST", PATH, START, headers)[0] == 200
    assert site.request("POST", PATH, START, headers)[0] == 403


def test_a_command_that_is_not_allowed_now_says_why(arms) -> None:
    site = arms()
    body = json.dumps({"do": "approve"}).encode()
    status, _, answer = site.request("POST", PATH, body, bearer("act"))
    assert status == 409
    assert "pending" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"do":"explode"}',
        b'{"do":"hold","why":7}',
        b'{"do":"hold","by":"%s"}' % (b"x" * 1001),
    ],
)
def test_what_is_no_command_is_refused(arms, body) -> None:
    assert arms().request("POST", PATH, body, bearer("act"))[0] == 400


def test_a_rollout_of_arms_with_different_models_does_not_start(arms) -> None:
    site = arms(models={"c0": "another-model"})
    status, _, answer = site.request("POST", PATH, START, bearer("act"))
    assert status == 409
    assert "fake-model and another-model" in json.loads(answer)["error"]["message"]


def test_a_rollout_to_nobody_does_not_start(arms) -> None:
    site = arms(absent=("c0",), wait=False)
    site.wait_healthy("b0")
    status, _, answer = site.request("POST", PATH, START, bearer("act"))
    assert status == 409
    assert "no healthy decode worker" in json.loads(answer)["error"]["message"]


def test_a_memory_that_went_away_is_told_and_requests_go_on(arms, tmp_path: Path) -> None:
    site = arms()
    site.command("start")
    site.wait_weight(50)
    for file in tmp_path.glob("rollout.sqlite*"):
        file.unlink()
    (tmp_path / "rollout.sqlite").write_bytes(b"no database " * 1000)

    def told():
        return site.document()["trouble"]

    from tests.gateway.harness import eventually

    eventually(told, "trouble")
    assert site.complete("hello")[0] == 200
    status, _, _ = site.request("POST", PATH, b'{"do":"hold"}', bearer("act"))
    assert status == 503
