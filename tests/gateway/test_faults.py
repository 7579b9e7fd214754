"""Bad days: each fault is injected for real; the client gets an answer, nothing is left behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack, eventually, free_port

Build = Callable[..., Stack]

FAST = {"prefill_s": 0.3, "first_byte_s": 0.4, "idle_s": 0.4}


def error_of(body: bytes) -> dict[str, object]:
    error = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "code"}
    assert isinstance(error, dict)
    return error


PREFILL_FAULTS = {
    "http_500": Behaviour(status=500),
    "http_503": Behaviour(status=503),
    "http_404": Behaviour(status=404),
    "http_429": Behaviour(status=429),
    "timeout": Behaviour(hang="head"),
    "closed": Behaviour(close="head"),
    "garbage": Behaviour(garbage="body"),
    "no_handoff": Behaviour(no_params=True),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", PREFILL_FAULTS)
def test_prefill_fault_is_served_by_decode_alone(build: Build, kind: str, stream: bool) -> None:
    stack = build(gateway=FAST, behaviours={"p0": PREFILL_FAULTS[kind]})
    status, body = stack.complete(stream=stream)
    assert status == 200
    assert b"t" in body
    stack.wait_idle()
    assert stack.engines["d0"].seen.locals == 1
    assert stack.metric("disagg_failures", ("p0", "prefill", kind)) == 1
    (record,) = stack.records(1)
    assert record["split"] == f"no: prefill {kind}"
    assert record["failures"][0]["kind"] == kind  # type: ignore[index]
    assert stack.metric("disagg_split_not_happening", (f"prefill {kind}",)) == 1


def test_prefill_that_does_not_speak_http(build: Build) -> None:
    stack = build(behaviours={"p0": Behaviour(garbage="http")})
    assert stack.complete()[0] == 200
    assert stack.metric("disagg_failures", ("p0", "prefill", "garbage")) == 1


@pytest.mark.parametrize("status", [400, 401, 422])
def test_prefill_validation_error_reaches_the_client_as_it_is(build: Build, status: int) -> None:
    stack = build(behaviours={"p0": Behaviour(status=status)})
    got, body = stack.complete()
    assert got == status
    assert error_of(body)["message"] == f"made to answer {status}"
    assert stack.engines["d0"].seen.requests == 0
    stack.wait_idle()


def test_prompt_over_the_context_length_is_the_workers_400(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(status=400)}, d0="decode")
    got, body = stack.complete()
    assert got == 400
    assert error_of(body)["message"] == "made to answer 400"
    assert stack.metric("disagg_failures") == 0


DECODE_FAULTS = {
    "http_500": (Behaviour(status=500), 502),
    "timeout": (Behaviour(hang="head"), 504),
    "closed": (Behaviour(close="head"), 502),
    "garbage": (Behaviour(garbage="body"), 502),
}


@pytest.mark.parametrize("kind", DECODE_FAULTS)
def test_only_decode_worker_fails_gives_a_clear_error(build: Build, kind: str) -> None:
    behaviour, expected = DECODE_FAULTS[kind]
    stack = build(gateway=FAST, behaviours={"d0": behaviour}, d0="decode")
    status, body = stack.complete(SHORT)
    assert status == expected
    assert "no worker could answer" in str(error_of(body)["message"])
    stack.wait_idle()
    assert stack.metric("disagg_failures", ("d0", "decode", kind)) == 1
    (record,) = stack.records(1)
    assert (record["status"], record["outcome"]) == (expected, "error")


@pytest.mark.parametrize("kind", DECODE_FAULTS)
@pytest.mark.parametrize("stream", [False, True])
def test_other_decode_worker_takes_over(build: Build, kind: str, stream: bool) -> None:
    behaviour, _ = DECODE_FAULTS[kind]
    stack = build(
        gateway=FAST, p0="prefill", d0="decode", d1="decode", behaviours={"d0": behaviour}
    )
    for _ in range(4):
        if stream and kind == "garbage":
            continue
        assert stack.complete(stream=stream)[0] == 200
    stack.wait_idle()


def test_decode_fault_with_handoff_is_retried_on_the_only_worker(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(status=500, times=1)})
    assert stack.complete()[0] == 200
    (record,) = stack.records(1)
    assert record["retries"] == 1
    assert record["split"] == "no: decode http_500"


def test_whole_answer_that_breaks_off_inside_is_retried(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(close="stream", times=1)})
    status, body = stack.complete()
    assert status == 200
    assert json.loads(body)["choices"]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(close="stream"), "closed"),
        (Behaviour(hang="stream"), "timeout"),
    ],
)
def test_stream_that_breaks_off_is_visible_to_the_client(
    build: Build, behaviour: Behaviour, kind: str
) -> None:
    stack = build(gateway=FAST, behaviours={"d0": behaviour})
    with pytest.raises(http.client.IncompleteRead) as caught:
        stack.complete(stream=True)
    events = caught.value.partial.split(b"\n\n")
    assert b"[DONE]" not in caught.value.partial
    last = [e for e in events if e.startswith(b"data: ")][-1]
    assert error_of(last[6:])["code"] == "upstream_broke_off"
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["outcome"] == "broken"
    assert stack.metric("disagg_failures", ("d0", "decode", kind)) == 1


def test_stream_that_lost_only_its_end_mark_is_completed_and_noted(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(no_done=True)})
    status, body = stack.complete(stream=True)
    assert status == 200
    assert b'"finish_reason":"length"' in body
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"[DONE]") == 1
    stack.wait_idle()
    (record,) = stack.records(1)
    assert (record["outcome"], record["resumes"]) == ("ok", 0)
    assert record["failures"][0]["kind"] == "truncated"  # type: ignore[index]
    assert stack.metric("disagg_failures", ("d0", "decode", "truncated")) == 1


@pytest.mark.parametrize("more", [{"stop": "x"}, {"logprobs": 1}])
def test_lost_end_mark_is_completed_where_nothing_else_could_go_on(
    build: Build, more: dict[str, object]
) -> None:
    stack = build(behaviours={"d0": Behaviour(no_done=True)})
    assert stack.complete(stream=True, **more)[1].endswith(b"data: [DONE]\n\n")


def test_lost_end_mark_breaks_the_stream_where_resuming_is_off(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(no_done=True)}, gateway={"resume": False})
    with pytest.raises(http.client.IncompleteRead) as caught:
        stack.complete(stream=True)
    assert b"upstream_broke_off" in caught.value.partial
    stack.wait_idle()
    assert stack.records(1)[0]["outcome"] == "broken"


def test_refused_decode_worker_is_unhealthy_and_named(build: Build) -> None:
    stack = build(p0="prefill", d0="decode", absent=("d0",))
    eventually(lambda: "refused" in stack.gateway.fleet.states["d0"].reason, "d0 is seen to refuse")
    status, body = stack.complete()
    assert status == 503
    assert "decode" in str(error_of(body)["message"])
    assert stack.request("GET", "/ready")[0] == 503


def test_prefill_worker_that_is_away_leaves_requests_local(build: Build) -> None:
    stack = build(p0="prefill", d0="decode", absent=("p0",))
    assert stack.complete()[0] == 200
    assert stack.engines["d0"].seen.locals == 1
    ready = json.loads(stack.request("GET", "/ready")[2])
    assert ready["roles"] == {"decode": True, "prefill": False}


def test_failures_in_a_row_rest_a_worker_until_a_probe_succeeds(build: Build) -> None:
    stack = build(
        d0="decode",
        d1="decode",
        behaviours={"d0": Behaviour(status=500, times=2)},
        gateway={"probe_s": 0.5, "unhealthy_after": 2},
    )
    state = stack.gateway.fleet.states["d0"]

    def rests() -> bool:
        assert stack.complete(SHORT)[0] == 200  # the other one takes over
        return state.outs == 1

    eventually(rests, "the worker rests")
    assert "http_500" in state.reason or state.healthy
    eventually(lambda: state.healthy, "the worker is back", 15.0)


def test_the_only_decode_worker_is_kept_in_use_though_it_fails(build: Build) -> None:
    stack = build(
        d0="decode",
        behaviours={"d0": Behaviour(status=500, times=6)},
        gateway={"probe_s": 30.0, "unhealthy_after": 2},
    )
    statuses = [stack.complete(SHORT)[0] for _ in range(4)]
    assert statuses == [502, 502, 502, 502]
    assert stack.gateway.fleet.states["d0"].kept
    eventually(lambda: stack.complete(SHORT)[0] == 200, "it serves again, no probe needed")


def test_two_models_in_one_fleet_is_named(build: Build) -> None:
    stack = build(
        wait=False, p0="prefill", d0="decode", models={"p0": "another-model"}, model="fake-model"
    )
    stack.wait_healthy("d0")
    states = stack.gateway.fleet.states
    eventually(lambda: "two models in one fleet" in states["p0"].reason, "the reason is told")
    assert stack.complete()[0] == 200
    assert stack.engines["p0"].seen.requests == 0


def test_unlike_fingerprints_switch_the_split_off_with_the_reason(build: Build) -> None:
    stack = build(reports=True)
    for name, fingerprint in (("p0", "aaaa"), ("d0", "bbbb")):
        reporter = stack.engines[name].reporter
        assert reporter is not None
        reporter.send({"kind": "hello", "role": "x", "fingerprint": fingerprint})
    states = stack.gateway.fleet.states
    eventually(lambda: all(states[n].hello for n in ("p0", "d0")), "both said hello")
    assert stack.complete()[0] == 200
    (record,) = stack.records(1)
    assert record["route"] == "local"
    assert "fingerprints differ" in str(record["why"])
    assert "fingerprints differ" in str(stack.status()["split_problems"])


@contextmanager
def worker_process(port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A fake engine as a process of its own, to be killed."""
    command = [sys.executable, "-m", "disagg_plugins.testing.fake_engine", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *more], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


def outside(build: Build, name: str, port: int) -> Stack:
    """Build a stack whose worker ``name`` is the process on ``port``."""
    stack = build(p0="prefill", d0="decode", absent=(name,), port_of={name: port})
    stack.wait_healthy()
    return stack


def test_prefill_killed_before_the_handoff(build: Build) -> None:
    port = free_port()
    with worker_process(port) as process:
        stack = outside(build, "p0", port)
        assert stack.complete()[0] == 200
        kill(process)
        assert stack.complete()[0] == 200
    assert stack.engines["d0"].seen.locals == 1
    stack.wait_idle()


def test_prefill_killed_during_the_handoff(build: Build) -> None:
    port = free_port()
    with worker_process(port, "--first-s", "30") as process:
        stack = outside(build, "p0", port)
        sock = stack.raw(completion(LONG))
        eventually(lambda: stack.gateway.pools["p0"].counts()["busy"] == 1, "prefill works")
        kill(process)
        with closing(http.client.HTTPResponse(sock)) as answer:
            answer.begin()
            assert answer.status == 200
            assert answer.read()
        sock.close()
    stack.wait_idle()
    assert stack.metric("disagg_split_not_happening") == 1


def test_decode_killed_before_it_answers(build: Build) -> None:
    port = free_port()
    with worker_process(port, "--first-s", "30") as process:
        stack = outside(build, "d0", port)
        sock = stack.raw(completion(LONG))
        eventually(lambda: stack.gateway.pools["d0"].counts()["busy"] == 1, "decode works")
        kill(process)
        with closing(http.client.HTTPResponse(sock)) as answer:
            answer.begin()
            assert answer.status in (502, 503)
            error_of(answer.read())
        sock.close()
    stack.wait_idle()


def test_decode_killed_inside_the_stream(build: Build) -> None:
    port = free_port()
    with worker_process(port, "--chunk-s", "0.05") as process:
        stack = outside(build, "d0", port)
        sock = stack.raw(completion(LONG, stream=True, max_tokens=1000))
        with closing(http.client.HTTPResponse(sock)) as answer:
            answer.begin()
            assert answer.read1(100)
            kill(process)
            with pytest.raises(http.client.IncompleteRead):
                answer.read()
        sock.close()
    stack.wait_idle()
    (record,) = stack.records(1)
    assert record["outcome"] == "broken"


def completion(prompt: str, *, stream: bool = False, max_tokens: int = 4) -> bytes:
    """Return a whole completion request as bytes."""
    body = json.dumps(
        {"model": "fake-model", "prompt": prompt, "stream": stream, "max_tokens": max_tokens}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


def test_a_stream_that_begins_with_the_workers_failure_is_tried_elsewhere(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(error_event=500, times=1)})
    status, body = stack.complete(stream=True)
    assert status == 200
    assert b"the KV did not come" not in body
    assert body.endswith(b"data: [DONE]\n\n")
    [record] = stack.records(1)
    assert record["retries"] == 1
    assert record["failures"][0]["kind"] == "error_event"  # type: ignore[index]


def test_such_a_stream_without_another_try_is_an_error_and_not_an_answer(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(error_event=500)})
    status, body = stack.complete(stream=True)
    assert status == 502
    assert b"the KV did not come" in body


def test_a_stream_that_begins_with_the_clients_error_is_passed_on(build: Build) -> None:
    stack = build(behaviours={"d0": Behaviour(error_event=400)})
    status, body = stack.complete(stream=True)
    assert status == 200
    assert b"the KV did not come" in body
    assert stack.engines["d0"].seen.requests == 1
