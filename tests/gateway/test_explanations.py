"""Why a request went where it went, told afterwards and in a header."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from disagg_plugins.gateway.explanations import KEPT, MAX_HEADER_BYTES, Explanations
from disagg_plugins.scheduling.trace import CORE, MOST_WORKERS
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_plugins.types import Decision, Local, RequestProfile, Role, Worker
from tests.gateway.harness import LONG, SHORT, Stack, eventually

Build = Callable[..., Stack]
WORKER = Worker("d0", "http://127.0.0.1:1", "vllm", Role.DECODE)
ASK = {"x-disagg-explain": "1", "content-type": "application/json"}


def profile(name: str) -> RequestProfile:
    return RequestProfile(name, "/v1/completions", "m", 9)


def explain(stack: Stack, name: str) -> tuple[int, dict[str, object]]:
    status, _, body = stack.request("GET", f"/internal/explain?id={name}")
    return status, json.loads(body)


def said(answer: dict[str, object], step: str, role: str | None = None) -> list[dict[str, object]]:
    steps = answer["steps"]
    assert isinstance(steps, list)
    return [s["said"] for s in steps if s["step"] == step and s.get("role") == role]


def post(stack: Stack, prompt: str, name: str, **headers: str) -> dict[str, str]:
    body = {"model": "fake-model", "prompt": prompt, "max_tokens": 4}
    given = {"x-request-id": name, **headers}
    return stack.request("POST", "/v1/completions", body, given)[1]


def test_a_split_request_tells_its_rule_its_scores_and_how_it_ended(build: Build) -> None:
    stack = build(p0="prefill", d0="decode", d1="decode")
    post(stack, LONG, "split-1")
    status, answer = explain(stack, "split-1")
    assert status == 200
    assert said(answer, "split")[0]["threshold"]["split"] is True  # type: ignore[index]
    assert set(said(answer, "score", "decode")[0]["least-loaded"]) == {"d0", "d1"}  # type: ignore[call-overload]
    (chosen,) = said(answer, "chosen", "decode")
    route = answer["route"]
    assert isinstance(route, dict)
    assert route["decode"] == chosen[CORE]
    assert route["prefill"] == "p0"
    assert answer["record"]["outcome"] == "ok"  # type: ignore[index]


def test_a_refusal_is_explained_too(build: Build) -> None:
    stack = build(p0="prefill", d0="decode")
    stack.engines["d0"].healthy = False
    eventually(lambda: not stack.gateway.fleet.states["d0"].healthy, "d0 is out")
    post(stack, SHORT, "refused-1")
    _, answer = explain(stack, "refused-1")
    assert answer["route"] == {"refused": "no healthy decode worker"}
    assert "capacity" in said(answer, "admission")[0]


def test_a_retry_adds_its_own_steps(build: Build) -> None:
    failing = {name: Behaviour(status=500) for name in ("d0", "d1")}
    stack = build(behaviours=failing, d0="decode", d1="decode")
    post(stack, SHORT, "retried-1")
    assert len(said(explain(stack, "retried-1")[1], "chosen", "decode")) == 2


def test_the_header_comes_only_when_it_is_asked_for(build: Build) -> None:
    stack = build(p0="prefill", d0="decode", d1="decode")
    assert "x-disagg-explain" not in post(stack, LONG, "plain-1")
    told = json.loads(post(stack, LONG, "asked-1", **ASK)["x-disagg-explain"])
    assert told["route"]["prefill"] == "p0"
    assert {s["step"] for s in told["steps"]} >= {"split", "score", "chosen"}


def test_the_header_asked_for_does_not_reach_the_workers(build: Build) -> None:
    stack = build()
    post(stack, SHORT, "asked-2", **ASK)
    assert "x-disagg-explain" not in stack.engines["d0"].seen.headers[-1]


def test_streams_and_refusals_carry_the_header(build: Build) -> None:
    stack = build()
    body = {"model": "fake-model", "prompt": SHORT, "max_tokens": 4, "stream": True}
    _, headers, _ = stack.request("POST", "/v1/completions", body, ASK)
    assert "x-disagg-explain" in headers
    stack.engines["d0"].healthy = False
    eventually(lambda: not stack.gateway.fleet.states["d0"].healthy, "d0 is out")
    status, headers, _ = stack.request("POST", "/v1/completions", body, ASK)
    assert status == 503
    assert "refused" in json.loads(headers["x-disagg-explain"])["route"]


def test_an_unknown_request_is_404_and_strangers_are_sent_away(build: Build) -> None:
    stack = build()
    assert explain(stack, "nobody")[0] == 404
    assert explain(stack, "")[0] == 404
    status, _, _ = stack.request("GET", "/internal/explain?id=x", headers={"via": "1.1 proxy"})
    assert status == 403


def test_only_the_last_requests_are_kept() -> None:
    kept = Explanations()
    for i in range(KEPT + 50):
        kept.begin(profile(str(i)))
    assert len(kept) == KEPT
    assert kept.of("49") is None
    assert kept.of("50") is not None


def test_a_request_id_used_again_is_the_later_request() -> None:
    kept = Explanations()
    kept.begin(profile("x")).refused = "first"
    kept.begin(profile("x"))
    assert len(kept) == 1
    assert kept.of("x").refused is None  # type: ignore[union-attr]


def test_a_header_never_grows_beyond_its_bound() -> None:
    explanation = Explanations().begin(profile("x"))
    scores = {f"worker-{i}": 0.5 for i in range(50)}
    for _ in range(100):
        explanation.trace.note("score", Role.DECODE, [("p", scores)])
    explanation.decision = Decision(Local(WORKER), "because")
    assert len(explanation.header()) <= MAX_HEADER_BYTES
    assert b"because" in explanation.header()
    explanation.decision = Decision(Local(WORKER), "\u00fc" * 5000)
    assert len(explanation.header()) <= MAX_HEADER_BYTES
    assert explanation.header().isascii()
    assert b"\n" not in explanation.header()


def test_what_is_kept_of_a_request_does_not_grow_with_its_prompt_or_the_fleet() -> None:
    names = [f"w{n}" for n in range(10_000)]
    long = replace(profile("r"), prefix_hashes=("h",) * 4096, cached_tokens={"w1": 64})
    explanation = Explanations().begin(long)
    scores = {name: n / 10_000 for n, name in enumerate(names)}
    explanation.trace.note("filter", Role.PREFILL, [("capacity", set(names)), ("other", None)])
    explanation.trace.note("score", Role.PREFILL, [("least-loaded", scores)])
    explanation.trace.note("chosen", Role.PREFILL, [(CORE, "w" * 100)])
    explanation.settle(len(names))
    assert (explanation.profile.prefix_hashes, explanation.profile.cached_tokens) == ((), {})
    left, scored, chosen = (step["said"] for step in explanation.trace.plain())
    assert left["capacity"][-1] == "and 9936 more"  # type: ignore[index]
    assert max(scored["least-loaded"].items(), key=lambda s: s[1]) == ("w9999", 0.9999)  # type: ignore[index]
    assert len(scored["least-loaded"]) == MOST_WORKERS  # type: ignore[index]
    assert chosen == {CORE: "w" * 100}


def test_a_gateway_keeps_no_hashes_of_prompts_that_were_routed_or_refused(build: Build) -> None:
    stack = build(p0="prefill", d0="decode")
    post(stack, LONG * 100, "routed-1")
    stack.engines["d0"].healthy = False
    eventually(lambda: not stack.gateway.fleet.states["d0"].healthy, "d0 is out")
    post(stack, LONG * 100, "refused-1")
    for name in ("routed-1", "refused-1"):
        kept = stack.gateway.explanations.of(name)
        assert kept is not None
        assert kept.profile.prefix_hashes == ()
