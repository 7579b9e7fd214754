"""Two arms behind one port: who gets which requests, and what the evidence does to them."""

from __future__ import annotations

import http.client
import json
import time

import pytest

from disagg_plugins.canary.override import MintedBy, mint_override
from disagg_plugins.testing.fake_engine import Behaviour
from tests.canary.side_by_side import SideBySide
from tests.gateway.harness import SECRET, eventually


def ask(site, count=1, **more):
    """Send requests one after the other; return their statuses."""
    return [site.complete("hello", **more)[0] for _ in range(count)]


def arm_counts(site):
    counts = site.gateway.metrics.counts("disagg_canary_requests")
    return {
        arm: sum(n for labels, n in counts.items() if labels.split()[0] == arm)
        for arm in ("baseline", "candidate")
    }


def test_without_a_rollout_the_baseline_serves_everything(arms) -> None:
    site = arms()
    assert set(ask(site, 20)) == {200}
    assert arm_counts(site) == {"baseline": 20, "candidate": 0}
    assert {r["arm"] for r in site.records(20)} == {"baseline"}


def test_a_started_rollout_divides_the_requests_and_is_promoted_by_the_evidence(arms) -> None:
    site = arms()
    site.command("start")
    site.wait_weight(50)

    def promoted():
        assert set(ask(site, 20)) == {200}
        return site.front.lookout.view.weight == 100

    eventually(promoted, "100 %")
    counts = arm_counts(site)
    assert counts["candidate"] > 20
    assert counts["baseline"] > 20
    eventually(lambda: site.front.lookout.view.progress.phase == "completed", "completed")
    kinds = [d["kind"] for d in site.document()["decisions"]]
    assert kinds == ["complete", "promote", "start"]


def test_a_candidate_that_fails_is_rolled_back_and_no_client_is_hurt(arms) -> None:
    site = arms(behaviours={"c0": Behaviour(status=500)})
    site.command("start")
    site.wait_weight(50)

    def rolled_back():
        assert set(ask(site, 10)) == {200}  # the baseline answers in the candidate's place
        return site.front.lookout.view.progress.phase == "rolled_back"

    eventually(rolled_back, "rolled back")
    assert site.front.lookout.view.weight == 0
    assert site.metric("disagg_canary_fallbacks") > 0
    before = arm_counts(site)["candidate"]
    assert set(ask(site, 20)) == {200}
    assert arm_counts(site)["candidate"] == before
    decision = site.document()["decisions"][0]
    assert decision["kind"] == "rollback"
    assert "error_rate" in decision["why"][0]


def test_a_candidate_without_a_healthy_worker_is_rolled_back_and_no_client_is_hurt(arms) -> None:
    site = arms(absent=("c0",), wait=False)
    site.wait_healthy("b0")
    site.command("start")
    site.wait_weight(50)

    def rolled_back():
        assert set(ask(site, 10)) == {200}
        return site.front.lookout.view.progress.phase == "rolled_back"

    eventually(rolled_back, "rolled back")


def test_a_stream_that_the_candidate_broke_off_is_not_begun_anew(arms) -> None:
    broken = Behaviour(close="stream", after_chunks=2)
    site = arms(behaviours={"c0": broken}, canary={"steps": [100]})
    site.command("start")
    site.wait_weight(100)
    body = {"model": "fake-model", "prompt": "hello", "stream": True, "max_tokens": 8}
    with pytest.raises(Exception, match="IncompleteRead|incomplete"):
        site.request("POST", "/v1/completions", body)


def test_a_tester_reaches_the_candidate_before_it_has_traffic(arms) -> None:
    site = arms()
    header = mint_override(
        MintedBy(SECRET, "default"), "candidate", now_s=time.time(), valid_s=60.0
    )
    body = {"model": "fake-model", "prompt": "hello", "max_tokens": 4}
    headers = {"x-disagg-arm": header, "x-disagg-explain": "1"}
    status, answered, _ = site.request("POST", "/v1/completions", body, headers)
    assert status == 200
    told = json.loads(answered["x-disagg-explain"])
    assert told["arm"] == "candidate: the client asked for it"
    assert arm_counts(site)["candidate"] == 1


def test_one_session_stays_at_one_arm(arms) -> None:
    site = arms(canary={"guardrails": [{"metric": "error_rate", "min_samples": 100_000}]})
    site.command("start")
    site.wait_weight(50)
    for session in ("a", "b", "c", "d", "e", "f"):
        before = arm_counts(site)
        body = {"model": "fake-model", "prompt": "hello", "max_tokens": 2}
        for _ in range(5):
            site.request("POST", "/v1/completions", body, {"x-disagg-session": session})
        after = arm_counts(site)
        assert sorted(after[arm] - before[arm] for arm in after) == [0, 5]


def test_a_client_that_leaves_in_the_queue_is_no_failure_of_its_arm(arms) -> None:
    site = arms(behaviours={"b0": Behaviour(hang="head")})
    sock = site.raw(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 41\r\n\r\n"
        b'{"model":"fake-model","prompt":"hello!!"}'
    )
    eventually(lambda: len(site.front.traffic) == 1, "in flight")
    sock.close()
    eventually(lambda: len(site.front.traffic) == 0, "over")
    eventually(lambda: site.front.traffic.counted["baseline"] == 1, "counted")
    judged = site.document()["guardrails"][0]
    assert judged["baseline"]["count"] == 0  # no error, and no success either


def test_metrics_of_both_arms_stand_on_one_page(arms) -> None:
    site = arms()
    ask(site, 3)
    _, _, page = site.request("GET", "/metrics")
    text = page.decode()
    assert 'disagg_requests_total{arm="baseline"' in text
    assert 'disagg_workers_healthy{arm="candidate"} 1.0' in text
    assert "disagg_canary_weight 0.0" in text
    assert (
        text.count("# TYPE disagg_requests_total counter")
        + text.count("# TYPE disagg_requests counter")
        == 1
    )


def test_shutdown_leaves_no_task_and_no_connection(arms) -> None:
    site = arms()
    ask(site, 3)
    site.stop()
    assert site.front.running() == []
    assert site.front.connections == set()


def test_status_and_workers_of_the_candidate_are_asked_for_by_arm(arms) -> None:
    site = arms()
    for target, name in (("/internal/status", "b0"), ("/internal/status?arm=candidate", "c0")):
        _, _, body = site.request("GET", target)
        assert [w["name"] for w in json.loads(body)["workers"]] == [name]


def test_a_gateway_that_comes_back_goes_on_at_the_same_step(arms, tmp_path) -> None:
    site = arms(canary={"bake_s": 3600})
    site.command("start")
    site.wait_weight(50)
    ask(site, 40)
    site.stop()
    again = SideBySide(tmp_path)
    again.engines = site.engines
    again.start()
    try:
        again.wait_weight(50)
        again.wait_all_healthy()
        assert set(ask(again, 20)) == {200}
        eventually(lambda: sum(again.front.traffic.counted.values()) == 20, "counted")
        figures = again.document()["guardrails"][0]
        counted = figures["baseline"]["count"] + figures["candidate"]["count"]
        assert counted == 60  # what was counted before the end is not lost
    finally:
        again.stop()


def test_the_answer_of_a_request_that_went_elsewhere_is_whole_on_one_connection(arms) -> None:
    """Many requests on one connection, half of which the candidate fails."""
    site = arms(behaviours={"c0": Behaviour(status=503)}, canary={"bake_s": 3600})
    site.command("start")
    site.wait_weight(50)
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    body = json.dumps({"model": "fake-model", "prompt": "hi", "stream": True, "max_tokens": 3})
    for _ in range(30):
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200
        assert text.count(b"[DONE]") == 1
    connection.close()
    assert site.metric("disagg_canary_fallbacks") > 3
