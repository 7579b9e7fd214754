"""What the gateway answers itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from disagg_plugins.telemetry.reports import PATH, report_key, sign
from tests.gateway.harness import SECRET, SHORT, Stack, eventually

Build = Callable[..., Stack]


@pytest.fixture
def stack(build: Build) -> Stack:
    return build()


def test_health_ready_and_models(stack: Stack) -> None:
    assert stack.request("GET", "/health")[0] == 200
    status, _, body = stack.request("GET", "/ready")
    assert status == 200
    assert json.loads(body)["roles"] == {"decode": True, "prefill": True}
    status, _, body = stack.request("GET", "/v1/models")
    assert [m["id"] for m in json.loads(body)["data"]] == ["fake-model"]


def test_ready_turns_503_when_no_decode_worker_is_healthy(stack: Stack) -> None:
    stack.engines["d0"].healthy = False
    eventually(lambda: stack.request("GET", "/ready")[0] == 503, "not ready")
    said = json.loads(stack.request("GET", "/ready")[2])
    assert said["reason"] == "no healthy decode worker"
    assert "503" in said["not_ready"]["d0"]
    assert stack.request("GET", "/health")[0] == 200
    stack.engines["d0"].healthy = True
    eventually(lambda: stack.request("GET", "/ready")[0] == 200, "ready again")


def test_unknown_model_is_404_and_bothers_no_worker(stack: Stack) -> None:
    status, body = stack.complete(SHORT, model="gpt-17")
    assert status == 404
    error = json.loads(body)["error"]
    assert error["code"] == "model_not_found"
    assert "fake-model" in error["message"]
    assert stack.engines["d0"].seen.requests == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 204),
    ],
)
def test_unknown_paths_and_methods(stack: Stack, method: str, path: str, status: int) -> None:
    got, headers, body = stack.request(method, path)
    assert got == status
    if status == 204:
        assert "POST" in headers["allow"]
    else:
        assert json.loads(body)["error"]["type"]


def test_head_has_no_body(stack: Stack) -> None:
    status, headers, body = stack.request("HEAD", "/health")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


def test_metrics_show_requests_and_latencies(stack: Stack) -> None:
    assert stack.complete(stream=True)[0] == 200
    stack.records(1)
    text = stack.request("GET", "/metrics")[2].decode()
    assert 'disagg_requests_total{outcome="ok",route="disaggregated",status="200"} 1.0' in text
    assert 'disagg_ttft_seconds_bucket{le="+Inf",route="disaggregated"} 1.0' in text
    assert "disagg_requests_in_flight 0.0" in text
    assert 'disagg_split_not_happening_total{reason="no report"} 1.0' in text


def test_status_holds_no_secret(stack: Stack) -> None:
    assert stack.complete()[0] == 200
    status, _, body = stack.request("GET", "/internal/status")
    assert status == 200
    assert SECRET not in body
    said = json.loads(body)
    assert {w["name"] for w in said["workers"]} == {"p0", "d0"}
    assert said["in_flight"] == 0


def test_status_tells_the_tasks_and_requests_leave_none(stack: Stack) -> None:
    assert stack.complete()[0] == 200
    at_rest = stack.status()["tasks"]
    for _ in range(5):
        assert stack.complete(stream=True)[0] == 200
    eventually(lambda: stack.status()["tasks"] == at_rest, "the tasks of a gateway at rest")


def post_report(stack: Stack, body: bytes, secret: bytes = SECRET, at_s: float = 0.0) -> int:
    signature = sign(report_key(secret), body, at_s or time.time())
    return stack.request("POST", PATH, body, {"X-Disagg-Signature": signature})[0]


HELLO = json.dumps([{"kind": "hello", "worker": "p0", "fingerprint": "f"}]).encode()


def test_signed_report_is_taken(stack: Stack) -> None:
    assert post_report(stack, HELLO) == 204
    hello = stack.gateway.fleet.states["p0"].hello
    assert hello is not None
    assert hello["fingerprint"] == "f"


def test_report_with_wrong_secret_or_old_signature_is_403_and_counted(stack: Stack) -> None:
    assert post_report(stack, HELLO, b"another secret of 32 bytes......") == 403
    assert post_report(stack, HELLO, at_s=time.time() - 3600) == 403
    assert stack.request("POST", PATH, HELLO)[0] == 403
    assert stack.request("POST", PATH, HELLO, {"X-Disagg-Signature": "t=1,v1=zz"})[0] == 403
    assert stack.metric("disagg_reports_rejected", ("signature",)) == 4
    assert stack.gateway.fleet.states["p0"].hello is None


@pytest.mark.parametrize("body", [b"{", b"{}", b'[{"kind": "order"}]', b'[{"kind": "hello"}]'])
def test_malformed_report_is_400(stack: Stack, body: bytes) -> None:
    assert post_report(stack, body) == 400


def test_report_of_unknown_handoff_or_worker_is_counted(stack: Stack) -> None:
    late = [{"kind": "ended", "worker": "p0", "handoff_id": "00", "outcome": "expired"}]
    assert post_report(stack, json.dumps(late).encode()) == 204
    assert post_report(stack, b'[{"kind": "hello", "worker": "stranger"}]') == 204
    assert stack.metric("disagg_reports_rejected", ("unknown_handoff",)) == 1
    assert stack.metric("disagg_reports_rejected", ("unknown_worker",)) == 1


def test_oversized_report_is_413(stack: Stack) -> None:
    assert post_report(stack, b"[" + b" " * 300_000 + b"]") == 413


def test_too_many_requests_in_flight_is_503_with_retry_after(build: Build) -> None:
    from disagg_plugins.testing.fake_engine import Behaviour

    stack = build(
        d0="decode", gateway={"max_requests": 1}, behaviours={"d0": Behaviour(hang="head")}
    )
    body = b'{"model":"fake-model","prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    stack.raw(head + body)
    eventually(lambda: len(stack.gateway.active) == 1, "one request is in flight")
    status, headers, answer = stack.request("POST", "/v1/completions", body)
    assert status == 503
    assert headers["retry-after"] == "1"
    assert "max_requests" in json.loads(answer)["error"]["message"]
