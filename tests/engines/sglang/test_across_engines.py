"""Prompts read by one engine and answered by the other, in both directions."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import pytest

from disagg_plugins.handoff.tickets import new_handoff_id
from tests import parity
from tests.corpus import prompts
from tests.engines.client import Completion, complete
from tests.engines.probes import idle, post, status, until
from tests.engines.sglang_bed import by_hand, endpoints_of, select, ticket_of
from tests.engines.testbed import MODEL_NAME, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def text_of(tokens: int, seed: int) -> str:
    return next(prompts([tokens], seed=seed))


def ask(url: str, prompt: str | list[int], max_tokens: int, **more: Any) -> Completion:
    return complete(url, prompt, max_tokens=max_tokens, model=MODEL_NAME, logprobs=None, **more)


@pytest.fixture(scope="class")
def from_vllm(bed: Testbed) -> None:
    select(bed, "vllm-prefill", "decode")


@pytest.fixture(scope="class")
def from_sglang(bed: Testbed) -> None:
    select(bed, "prefill", "vllm-decode")


@pytest.mark.usefixtures("from_vllm")
class TestSglangGoesOnFromVllm:
    """vLLM reads the prompt and samples one token; SGLang takes KV and token over."""

    @pytest.mark.parametrize("tokens", [20, 300, 1100])
    def test_answers_are_those_of_sglang_unsplit(self, bed: Testbed, tokens: int) -> None:
        text, name = text_of(tokens, seed=100 + tokens), f"vs-{tokens}"
        answer = ask(bed.gateway_url, text, 32, request_id=name)
        assert answer.text == ask(bed.urls["whole"], text, 32).text
        handoff = parity.record_of(bed, name)["handoff"]
        assert (handoff["outcome"], handoff["form"]) == ("consumed", "canonical")
        assert handoff["tokens_loaded"] == answer.usage["prompt_tokens"]
        assert handoff["tokens_recomputed"] == 0

    def test_only_what_the_decode_workers_cache_lacks_is_moved(self, bed: Testbed) -> None:
        text = text_of(600, seed=110)
        ask(bed.gateway_url, text[: len(text) // 2], 4)
        answer = ask(bed.gateway_url, text, 8, request_id="vs-partly")
        assert answer.text == ask(bed.urls["whole"], text, 8).text
        handoff = parity.record_of(bed, "vs-partly")["handoff"]
        assert handoff["tokens_local"] > 150
        assert handoff["tokens_local"] + handoff["tokens_loaded"] == answer.usage["prompt_tokens"]

    @pytest.mark.parametrize(
        "more",
        [
            {"max_tokens": 1},
            {"max_tokens": 24, "stop": ["\n"]},
            {"max_tokens": 24, "min_tokens": 20},
        ],
    )
    def test_what_ends_an_answer_holds_across_engines(
        self, bed: Testbed, more: dict[str, Any]
    ) -> None:
        body = {"model": MODEL_NAME, "prompt": text_of(150, seed=111), "temperature": 0, **more}
        ours, theirs = (
            post(url, "/v1/completions", body)[1] for url in (bed.gateway_url, bed.urls["whole"])
        )
        assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
        assert ours["choices"][0]["finish_reason"] == theirs["choices"][0]["finish_reason"]
        assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]

    def test_a_chat_answers_like_sglang_unsplit(self, bed: Testbed) -> None:
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "Explain:\n" + text_of(200, seed=112)}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answers = [
            post(url, "/v1/chat/completions", body)[1]
            for url in (bed.gateway_url, bed.urls["whole"])
        ]
        ours, theirs = (answer["choices"][0]["message"]["content"] for answer in answers)
        assert ours == theirs

    def test_sampled_answers_are_of_the_asked_length(self, bed: Testbed) -> None:
        more = {"temperature": 0.9, "seed": 7}
        answer = ask(bed.gateway_url, text_of(150, seed=113), 12, extra=more)
        assert answer.usage["completion_tokens"] == 12

    def test_logprobs_are_refused_and_the_reason_told(self, bed: Testbed) -> None:
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 4, "logprobs": 1}
        code, answer = post(bed.gateway_url, "/v1/completions", body)
        assert code == 400
        assert "logprobs of a first token that another engine sampled" in json.dumps(answer)

    def test_requests_at_once_are_all_right(self, bed: Testbed) -> None:
        texts = list(prompts([150, 250, 350, 450], seed=114))
        expected = [ask(bed.urls["whole"], text, 12).text for text in texts]
        with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
            answers = list(pool.map(lambda text: ask(bed.gateway_url, text, 12).text, texts))
        assert answers == expected


@pytest.mark.usefixtures("from_sglang")
class TestVllmGoesOnFromSglang:
    """SGLang reads the prompt; vLLM takes the KV and samples from its last token."""

    @pytest.mark.parametrize("tokens", [20, 300, 1100])
    def test_answers_are_those_of_vllm_unsplit(self, bed: Testbed, tokens: int) -> None:
        text, name = text_of(tokens, seed=200 + tokens), f"sv-{tokens}"
        answer = parity.cold(bed, text, 32, name)
        handoff = parity.record_of(bed, name)["handoff"]
        assert (handoff["outcome"], handoff["form"]) == ("consumed", "canonical")
        assert handoff["tokens_loaded"] == answer.usage["prompt_tokens"] - 1
        alone = complete(
            bed.urls["vllm-decode"],
            text,
            max_tokens=32,
            model=MODEL_NAME,
            extra={"cache_salt": "alone"},
        )
        assert parity.compare(answer, alone) != "different"

    def test_log_probabilities_are_vllms_own(self, bed: Testbed) -> None:
        answer = parity.cold(bed, text_of(100, seed=210), 4)
        assert len(answer.top) == 4

    def test_a_killed_prefill_request_leaves_the_prompt_to_vllm(self, bed: Testbed) -> None:
        processes = bed.processes("prefill")
        for process in processes:
            process.suspend()
        try:
            answer = parity.cold(bed, text_of(400, seed=211), 8, "sv-stopped")
        finally:
            for process in processes:
                process.resume()
        assert answer.usage["completion_tokens"] == 8
        record = parity.record_of(bed, "sv-stopped")
        assert record["failures"]
        assert record["split"] != "yes"
        until(lambda: idle(bed, ("prefill", "vllm-decode")), "the workers to be idle")


def test_workers_with_another_model_are_named_and_never_paired(bed: Testbed) -> None:
    select(bed, "vllm-tiny", "vllm-prefill", "decode")
    problems = status(bed)["split_problems"]
    assert any("vllm-tiny" in p and "num_layers 4 and 30" in p for p in problems), problems
    for i in range(4):
        ask(bed.gateway_url, f"{i} " + text_of(50, seed=300), 4, request_id=f"model-{i}")
        assert parity.record_of(bed, f"model-{i}")["prefill"] == "vllm-prefill"


def test_kv_of_another_model_is_refused_by_the_worker_itself(bed: Testbed) -> None:
    select(bed, "vllm-tiny", "decode")
    handoff_id, prompt = new_handoff_id(), [41] * 100
    ticket = ticket_of(handoff_id, prefill="vllm-tiny")
    params = {"disagg": {"version": 1, "step": "prefill", "ticket": ticket}}
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 1, "kv_transfer_params": params}
    assert post(bed.urls["vllm-tiny"], "/v1/completions", body)[0] == 200
    code, answer = by_hand(
        bed,
        "decode",
        prompt,
        handoff_id,
        ticket=ticket,
        endpoints=endpoints_of(bed, "vllm-tiny"),
        first_token=5,
    )
    assert code == 500
    assert "cannot share KV" in json.dumps(answer)
