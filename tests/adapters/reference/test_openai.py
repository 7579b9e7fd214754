"""What a client may ask for, and what it is told when it may not."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_reference.openai import (
    DEFAULT_COMPLETION_TOKENS,
    UNSUPPORTED,
    Asked,
    BadRequest,
    read_request,
)
from disagg_reference.request import Sampling

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def completion(**body: Any) -> Asked:
    return read_request({"prompt": "Hi", **body}, chat=False)


def chat(**body: Any) -> Asked:
    return read_request({**HELLO, **body}, chat=True)


def test_a_completion_has_openais_defaults() -> None:
    asked = completion()
    assert (asked.prompt, asked.max_tokens) == ("Hi", DEFAULT_COMPLETION_TOKENS)
    assert asked.sampling == Sampling(temperature=1.0)
    flags = (asked.chat, asked.stream, asked.usage, asked.ids, asked.ignore_eos)
    assert not any(flags)


def test_a_chat_is_as_long_as_its_context_unless_it_says_otherwise() -> None:
    assert chat().max_tokens is None
    assert chat(max_tokens=5).max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_every_field_is_read() -> None:
    asked = completion(
        prompt=[1, 2],
        max_tokens=3,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=4,
        seed=-6,
        logprobs=2,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        return_token_ids=True,
        ignore_eos=True,
        model="m",
        kv_transfer_params={"disagg": {}},
    )
    assert asked == Asked(
        False,
        (1, 2),
        (),
        3,
        2,
        Sampling(0.0, 0.5, 4, -6, 2),
        True,
        ("a", "b"),
        True,
        True,
        True,
        {"disagg": {}},
        None,
        "m",
    )


def test_null_is_as_good_as_nothing() -> None:
    fields = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "n")
    fields += ("logprobs", "stream_options", "kv_transfer_params", "disaggregated_params")
    assert completion(**dict.fromkeys(fields)) == completion()


def test_neutral_values_of_what_is_not_supported_pass() -> None:
    completion(n=1, best_of=1, echo=False, suffix="", presence_penalty=0, logit_bias={}, top_k=-1)
    chat(tools=[], response_format={"type": "text"})


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_would_change_the_answer_is_refused(key: str) -> None:
    with pytest.raises(BadRequest, match=f"{key} is not supported"):
        completion(**{key: {"type": "other"}})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"prompt": None}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [1, True]}, "prompt must be"),
        ({"prompt": ["a", "b"]}, "prompt must be"),
        ({"n": 2}, "n must be 1"),
        ({"n": 0}, "at least 1"),
        ({"max_tokens": 0}, "at least 1, not 0"),
        ({"max_tokens": 1.5}, "whole number"),
        ({"max_tokens": True}, "whole number"),
        ({"min_tokens": -1}, "at least 0"),
        ({"temperature": "hot"}, "must be a number"),
        ({"temperature": 2.1}, "between 0 and 2"),
        ({"temperature": float("nan")}, "between 0 and 2"),
        ({"temperature": True}, "must be a number"),
        ({"top_p": 0}, "above 0"),
        ({"top_p": 1.01}, "between 0 and 1"),
        ({"top_k": -2}, "top_k must be"),
        ({"top_k": 1.0}, "top_k must be"),
        ({"seed": "x"}, "seed must be"),
        ({"logprobs": 21}, "at most 20"),
        ({"stop": ""}, "1 to 256"),
        ({"stop": ["x" * 257]}, "1 to 256"),
        ({"stop": [1]}, "1 to 256"),
        ({"stop": {"a": 1}}, "stop must be"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stream": "yes"}, "true or false"),
        ({"stream_options": [1]}, "must be an object"),
        ({"kv_transfer_params": [1]}, "must be an object"),
        ({"disaggregated_params": "x"}, "must be an object"),
        ({"disaggregated_params": {"request_type": "context_only"}}, "not its cache transceiver"),
    ],
)
def test_what_makes_no_sense_is_refused(body: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        completion(**body)


@pytest.mark.parametrize("request_id", [None, 0, -1, 7, 1 << 63, "7", True])
def test_a_demanded_id_has_63_bits(request_id: object) -> None:
    params = {"request_type": "context_and_generation", "disagg_request_id": request_id}
    with pytest.raises(BadRequest, match="41 to 63 bits"):
        completion(disaggregated_params=params)


def test_a_demanded_id_is_that_of_the_request() -> None:
    params = {"request_type": "context_and_generation", "disagg_request_id": 1 << 40 | 7}
    asked = completion(disaggregated_params=params)
    assert (asked.request_id, asked.params) == (1 << 40 | 7, params)


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_a_body_is_an_object(body: object) -> None:
    with pytest.raises(BadRequest, match="JSON object"):
        read_request(body, chat=False)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "at least one"),
        ([], "at least one"),
        (["Hi"], "object with a role"),
        ([{"content": "Hi"}], "object with a role"),
        ([{"role": "user", "content": 3}], "text or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only text parts"),
    ],
)
def test_messages_are_text(messages: object, problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        chat(messages=messages)


def test_parts_of_a_text_become_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "user", "content": parts}, {"role": "assistant"}])
    assert [message["content"] for message in asked.messages] == ["a\nb", ""]


def test_a_chat_tells_log_probabilities_only_when_asked() -> None:
    assert chat(top_logprobs=3).sampling.logprobs is None
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).sampling.logprobs == 3
