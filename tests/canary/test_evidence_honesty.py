"""What is counted for an arm is what happened to the request that it was given."""

from __future__ import annotations

import http.client
import json

from disagg_plugins.gateway import explanations
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, eventually

ALWAYS = {"steps": [100], "bake_s": 3600}


def at_the_candidate(arms, **more):
    """Return a site whose candidate gets every request."""
    site = arms(canary=ALWAYS, **more)
    site.command("start")
    site.wait_weight(100)
    return site


def raw_request(name: str, prompt: str = "hello") -> bytes:
    body = json.dumps({"model": "fake-model", "prompt": prompt, "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: {name}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def judged(site, arm: str) -> int:
    """Return how many requests of an arm ended, well or badly."""
    figure = site.document()["guardrails"][0][arm]
    return 0 if figure is None else figure["count"]


def test_a_request_that_the_end_of_the_gateway_cut_off_is_no_failure_of_its_arm(arms) -> None:
    site = at_the_candidate(arms, behaviours={"c0": Behaviour(hang="head")})
    site.raw(raw_request("cut-off"))
    eventually(lambda: site.front.candidate.active, "in flight")
    site.request_stop()
    eventually(lambda: not site._thread.is_alive(), "the end, with its client waiting")
    assert site.front.traffic.counted == {"baseline": 0, "candidate": 0}


def test_a_request_that_comes_while_the_gateway_ends_is_no_failure_of_its_arm(arms) -> None:
    site = at_the_candidate(arms, behaviours={"c0": Behaviour(hang="head", times=1)})
    sock = site.raw(raw_request("held"))
    eventually(lambda: site.front.candidate.active, "in flight")
    site.front.candidate.draining = True  # as in the first moments of the end
    site.front.draining = True
    assert site.complete("hello")[0] == 200  # the baseline takes it still
    sock.close()
    eventually(lambda: site.front.traffic.counted["candidate"] == 1, "the first is counted")
    assert judged(site, "candidate") == 0


def test_a_candidate_that_fails_inside_the_gateway_is_spared_the_client_and_counted(arms) -> None:
    site = at_the_candidate(arms)

    def fails(*_: object) -> None:
        raise RuntimeError("a plugin did what it must not")

    site.front.candidate.intake.profile = fails
    assert site.complete("hello")[0] == 200
    assert len(site.front.traffic) == 0
    eventually(lambda: judged(site, "candidate") == 1, "counted")
    assert site.document()["guardrails"][0]["candidate"]["estimate"] == 1.0


def test_a_model_that_neither_arm_serves_is_no_failure_of_any(arms) -> None:
    site = at_the_candidate(arms)
    status, answer = site.complete("hello", model="no-such-model")
    assert status == 404
    assert b"fake-model" in answer  # what is served
    assert site.complete("hello")[0] == 200
    eventually(lambda: judged(site, "candidate") >= 1, "counted")
    assert site.document()["guardrails"][0]["candidate"]["estimate"] == 0.0


def test_a_model_that_the_candidate_lacks_is_its_failure(arms) -> None:
    site = at_the_candidate(arms, models={"c0": "another-model"})
    assert site.complete("hello")[0] == 200
    eventually(lambda: judged(site, "candidate") == 1, "counted")
    assert site.document()["guardrails"][0]["candidate"]["estimate"] == 1.0


def test_two_requests_of_one_id_are_counted_each_by_its_own_end(arms) -> None:
    site = arms(behaviours={"b0": Behaviour(hang="head", times=1)})
    first = site.raw(raw_request("same"))
    eventually(lambda: site.front.baseline.active, "the first hangs")
    headers = {"x-request-id": "same"}
    body = {"model": "fake-model", "prompt": "hello", "max_tokens": 2}
    status, answered, _ = site.request("POST", "/v1/completions", body, headers)
    assert status == 200
    first.close()
    eventually(lambda: site.front.traffic.counted["baseline"] == 2, "both are counted")
    eventually(lambda: judged(site, "baseline") == 1, "one was answered, one client left")
    assert site.front.traffic.skipped == 0
    assert answered["x-request-id"] != "same"  # it is taken


def test_a_client_that_closes_after_its_answer_has_not_left_its_request(arms, monkeypatch) -> None:
    """The record waits for reports, and so many requests came since that it is not remembered."""
    monkeypatch.setattr(explanations, "KEPT", 1)
    site = at_the_candidate(
        arms,
        candidate={"telemetry": {"report_wait_s": 1.0}},
        b0="both",
        c0="prefill",
        c1="decode",
    )
    body = json.dumps({"model": "fake-model", "prompt": LONG, "max_tokens": 2})
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("POST", "/v1/completions", body)
    assert len(connection.getresponse().read()) > 0
    assert site.complete("hello")[0] == 200
    connection.close()
    eventually(lambda: site.front.traffic.counted["candidate"] == 2, "both are counted")
    eventually(lambda: judged(site, "candidate") == 2, "both were answered")


def test_a_tenant_that_asks_for_more_than_it_may_is_no_failure_of_the_arm(arms) -> None:
    rules = {"tenants": {"ann": {"prompt_tokens_per_s": 0.001, "burst_tokens": 20}}}
    site = at_the_candidate(arms, baseline={"scheduler": rules}, candidate={"scheduler": rules})
    statuses = [site.complete("x" * 32, user="ann")[0] for _ in range(6)]  # 8 tokens each
    eventually(lambda: site.front.traffic.counted["candidate"] == 6, "counted")
    assert site.document()["guardrails"][0]["candidate"]["estimate"] == 0.0
    assert statuses == [200, 200, 429, 429, 429, 429]
