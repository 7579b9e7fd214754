"""TensorRT-LLM's own disaggregated serving through a real gateway, hostile servers included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg_plugins import hookimpl
from disagg_plugins.canary.metrics import outcome_of
from disagg_plugins.cli.checks import Level
from disagg_plugins.cli.live import judge
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.prediction import observations
from disagg_plugins.telemetry.records import RequestRecord
from disagg_trtllm.native import NativeTrtllmDialect
from disagg_vllm.dialect import VllmDialect
from tests.adapters.trtllm.native_servers import PROMPT_IDS, NativeServer
from tests.gateway.harness import Stack, free_port

LARGE = 1 << 53


class Plugin:
    @hookimpl
    def disagg_register_dialects(self) -> list[object]:
        return [NativeTrtllmDialect(), VllmDialect()]


class Site:
    """A gateway before a context and a generation server."""

    def __init__(self, stack: ExitStack, folder: Path, context: NativeServer, engine: str) -> None:
        self.context, self.generation = context, NativeServer()
        for server in (self.context, self.generation):
            stack.enter_context(server)
        policy = Policy.model_validate(
            {
                "model": "m",
                "fleet": {
                    "workers": [
                        {
                            "name": "c", "url": self.context.url, "role": "prefill",
                            "engine": "trtllm-native",
                        },
                        {
                            "name": "g", "url": self.generation.url, "role": "decode",
                            "engine": engine,
                        },
                    ]
                },
                "scheduler": {"split": {"rule": "always"}},
                "gateway": {
                    "port": free_port(), "probe_s": 0.1, "probe_generate_s": None,
                    "prefill_s": 1.0, "drain_s": 2.0,
                },
                "telemetry": {"report_wait_s": 0.1},
            }
        )  # fmt: skip
        self.stack = Stack(policy, folder / "records.jsonl", Plugin())
        stack.callback(self.stack.stop)
        self.stack.start().wait_healthy("c", "g")

    def ask(self, **more: Any) -> tuple[int, Any]:
        chat = "messages" in more
        body = {"model": "m", "max_tokens": 8, **({} if chat else {"prompt": "Hello"}), **more}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        status, _, answer = self.stack.request("POST", path, body)
        return status, answer.decode() if body.get("stream") else json.loads(answer)

    @property
    def record(self) -> dict[str, Any]:
        return self.stack.records(1)[-1]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:

        def build(engine: str = "trtllm-native", **more: Any) -> Site:
            return Site(stack, tmp_path, NativeServer(**more), engine)

        yield build


def test_generation_gets_every_parameter_as_it_came(site) -> None:
    two = site()
    status, answer = two.ask()
    assert (status, answer["choices"][0]["text"]) == (200, "Hi there")
    (asked,) = two.context.seen
    params = asked["disaggregated_params"]
    assert params["request_type"] == "context_only"
    assert params["disagg_request_id"] > LARGE  # and yet exact, below
    assert (asked["max_tokens"], asked["stream"], asked["stream_options"]) == (8, False, None)
    (told,) = two.generation.seen
    assert told["prompt"] == PROMPT_IDS
    assert told["max_tokens"] == 8
    assert told["disaggregated_params"] == {
        "request_type": "generation_only", "first_gen_tokens": [29892],
        "ctx_request_id": params["disagg_request_id"], "encoded_opaque_state": "b3BhcXVl",
        "draft_tokens": None, "disagg_request_id": params["disagg_request_id"],
        "ctx_dp_rank": 0, "ctx_info_endpoint": None, "schedule_style": 0,
    }  # fmt: skip
    assert (two.record["route"], two.record["failures"]) == ("disaggregated", [])


def test_a_handoff_is_told_as_what_nobody_here_observes(site) -> None:
    two = site()
    assert two.ask()[0] == 200
    record, told = two.record, two.stack.status()
    assert record["split"] == "unobserved"
    handoff = record["handoff"]
    assert (handoff["outcome"], handoff["report"]) == ("unobserved", "none")
    assert told["split"]["unobserved"] == 1
    assert told["split"]["not_happening"] == {}
    found = list(judge(told))
    assert [f for f in found if f.level is not Level.OK] == []
    assert any("the engine's own transport" in f.detail for f in found)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_handoff_that_was_refused_is_a_split_that_did_not_happen(site, side) -> None:
    two = site(change=without_params if side == "prefill" else lambda answer: answer)
    two.generation.refuses = side == "decode"
    assert two.ask()[0] == 200
    kind = "no_handoff" if side == "prefill" else "http_400"
    record, told = two.record, two.stack.status()
    assert record["split"] == f"no: {side} {kind}"
    assert told["split"]["not_happening"] == {f"no: {side} {kind}": 1}
    assert outcome_of(msgspec.convert(record, RequestRecord), "candidate").kv_failed is True
    (problem,) = [f for f in judge(told) if f.subject == "split"]
    assert problem.level is Level.PROBLEM


def test_a_chat_keeps_its_messages_and_is_told_the_prompts_ids(site) -> None:
    two = site()
    messages = [{"role": "user", "content": "Hello"}]
    assert two.ask(messages=messages)[0] == 200
    (told,) = two.generation.seen
    assert told["messages"] == messages
    assert told["prompt_token_ids"] == PROMPT_IDS
    assert "prompt" not in told


def test_a_stream_comes_from_generation(site) -> None:
    two = site()
    status, text = two.ask(stream=True)
    assert status == 200
    assert "Hi there" in text
    assert text.endswith("data: [DONE]\n\n")
    assert two.generation.seen[0]["stream"] is True


@pytest.mark.parametrize("more", [{}, {"messages": [{"role": "user", "content": "Hello"}]}])
def test_an_answer_that_context_has_ended_is_the_clients(site, more) -> None:
    two = site(finish_reason="stop")
    status, answer = two.ask(**more)
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert "disaggregated_params" not in choice
    assert "prompt_token_ids" not in answer
    assert answer["usage"]["completion_tokens"] == 1
    assert two.generation.seen == []
    record = two.record
    assert (record["outcome"], record["split"]) == ("ok", "no: ended by prefill")
    assert record["handoff"]["outcome"] == "not_needed"
    assert (record["prompt_tokens"], record["output_tokens"], record["finish"]) == (2, 1, "stop")
    assert record["prefill_s"] <= record["ttft_s"] <= record["e2e_s"]
    assert record["tpot_s"] is None
    written = {w["name"]: w["tokens_written"] for w in two.stack.status()["workers"]}
    assert written == {"c": 1, "g": 0}
    assert [f for f in judge(two.stack.status()) if f.level is not Level.OK] == []
    two.stack.wait_idle()


@pytest.mark.parametrize("chat", [False, True])
def test_an_ended_answer_reaches_a_stream_as_events(site, chat: bool) -> None:
    two = site(finish_reason="stop")
    more = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {}
    status, text = two.ask(stream=True, stream_options={"include_usage": True}, **more)
    assert status == 200
    *events, end = text.strip().split("\n\n")
    assert end == "data: [DONE]"
    first, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    (choice,) = first["choices"]
    said = choice["delta"]["content"] if chat else choice["text"]
    assert (said, choice["finish_reason"]) == ("Hi", "stop")
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 3)
    record = two.record
    assert (record["prompt_tokens"], record["output_tokens"]) == (2, 1)
    assert record["prefill_s"] <= record["ttft_s"] <= record["e2e_s"]
    assert [each.phase for each in observations(record)] == ["prefill"]
    assert two.generation.seen == []


def set_params(**told: Any) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["disaggregated_params"] |= told
        return answer

    return change


def without_params(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["disaggregated_params"] = None
    return answer


def twice(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"] *= 2
    return answer


def as_floats(answer: dict[str, Any]) -> dict[str, Any]:
    params = answer["choices"][0]["disaggregated_params"]
    params["disagg_request_id"] = float(params["disagg_request_id"])
    return answer


def ends_with(reason: object) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][0]["finish_reason"] = reason
        return answer

    return change


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    del answer["prompt_token_ids"]
    return answer


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_params, "has no disaggregated_params"),
        (twice, "not exactly one choice"),
        (lambda answer: {**answer, "choices": []}, "not exactly one choice"),
        (lambda answer: {**answer, "choices": ["x"]}, "not exactly one choice"),
        (set_params(ctx_request_id=None), "no ctx_request_id"),
        (set_params(disagg_request_id=1 << 41), "is of request 2199023255552"),
        (as_floats, "floating point"),
        (set_params(encoded_opaque_state="x" * ((8 << 20) + 1)), "exceeds|characters, at most"),
        (without_ids, "has no prompt_token_ids"),
        (ends_with(None), "ended with None"),
        (ends_with("timeout"), "ended with 'timeout'"),
        (lambda answer: {**answer, "usage": None}, "tells prompt_tokens"),
        (lambda answer: "no JSON", "not JSON"),
    ],
)
def test_a_false_context_answer_leaves_the_request_to_generation(site, change, why) -> None:
    two = site(change=change)
    status, answer = two.ask()
    assert (status, answer["choices"][0]["text"]) == (200, "Hi there")
    (told,) = two.generation.seen
    assert "disaggregated_params" not in told
    assert told["prompt"] == "Hello"
    (failure,) = two.record["failures"]
    assert any(each in failure["detail"] for each in why.split("|")), failure


def test_a_context_server_that_hangs_is_given_up_in_time(site) -> None:
    two = site(hangs=True)
    status, answer = two.ask()
    assert (status, answer["choices"][0]["text"]) == (200, "Hi there")
    (failure,) = two.record["failures"]
    assert failure["kind"] == "timeout"
    two.stack.wait_idle()


def test_a_clients_own_parameters_reach_nobody(site) -> None:
    two = site()
    assert two.ask(disaggregated_params={"request_type": "context_only"})[0] == 200
    assert two.context.seen == []
    assert "disaggregated_params" not in two.generation.seen[0]


def test_native_workers_hand_over_to_their_own_kind_only(site) -> None:
    two = site(engine="vllm")
    assert two.ask()[0] == 200
    assert two.context.seen == []
    (problem,) = two.stack.status()["split_problems"]
    assert "trtllm-native hands over by its own means" in problem
