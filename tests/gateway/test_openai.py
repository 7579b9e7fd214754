"""What the gateway reads from a request body, and what it refuses."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.gateway.openai import (
    CHAT,
    COMPLETIONS,
    ParsedRequest,
    RequestError,
    not_splittable,
    parse_request,
)


def parse(endpoint: str = COMPLETIONS, **body: object) -> ParsedRequest:
    return parse_request(endpoint, json.dumps(body).encode(), chars_per_token=4.0)


@pytest.mark.parametrize(
    ("prompt", "tokens", "exact"),
    [
        ("x" * 10, 3, False),
        ("", 0, False),
        ([1, 2, 3], 3, True),
        (["abcd", "abcdefgh"], 3, False),
        ([[1, 2], [3]], 3, False),
    ],
)
def test_prompt_tokens(prompt: object, tokens: int, exact: bool) -> None:
    parsed = parse(prompt=prompt)
    assert (parsed.prompt_tokens, parsed.exact) == (tokens, exact)


def test_chat_tokens_count_text_parts_and_tools() -> None:
    messages = [
        {"role": "system", "content": "x" * 40},
        {"role": "user", "content": [{"type": "text", "text": "y" * 40}]},
        {"role": "assistant", "content": None},
    ]
    assert parse(CHAT, messages=messages).prompt_tokens == 20 + 12
    assert parse(CHAT, messages=messages, tools=[{"name": "z" * 60}]).prompt_tokens > 32 + 15


def test_bound_prefers_the_newer_field() -> None:
    assert parse(prompt="x", max_tokens=3).max_output_tokens == 3
    assert parse(prompt="x", max_tokens=3, max_completion_tokens=5).max_output_tokens == 5


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"prompt": 3}', "prompt must be"),
        (b"{}", "prompt must be"),
        (b'{"prompt": []}', "prompt must be"),
        (b'{"prompt": [1, "a"]}', "mixes"),
        (b'{"prompt": [{}]}', "wrong type"),
        (b'{"prompt": "x", "model": 1}', "model must be a string"),
        (b'{"prompt": "x", "stream": "yes"}', "stream must be a boolean"),
        (b'{"prompt": "x", "max_tokens": "4"}', "max_tokens must be an integer"),
        (b'{"prompt": "x", "max_tokens": true}', "max_tokens must be an integer"),
        (b'{"prompt": "x", "n": 1.5}', "n must be an integer"),
    ],
)
def test_wrong_completion_body(raw: bytes, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        parse_request(COMPLETIONS, raw, chars_per_token=4.0)
    assert caught.value.status == 400
    error = json.loads(caught.value.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"{}", b'{"messages": []}', b'{"messages": ["x"]}'])
def test_wrong_chat_body(raw: bytes) -> None:
    with pytest.raises(RequestError, match="message"):
        parse_request(CHAT, raw, chars_per_token=4.0)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"n": 2}, "n > 1"),
        ({"best_of": 3}, "best_of > 1"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": ["a", "b"]}, "a batch of prompts"),
        ({"prompt": [[1], [2]]}, "a batch of prompts"),
        ({"tool_choice": "required"}, "a forced tool call"),
        ({"tool_choice": {"type": "function"}}, "a forced tool call"),
        (
            {"messages": [{"content": [{"type": "image_url"}]}]},
            "message content other than text",
        ),
        ({"prompt": "a", "n": 1, "tool_choice": "auto", "logprobs": 3}, None),
        ({"prompt": [1, 2]}, None),
        ({"messages": [{"content": [{"type": "text", "text": "x"}]}]}, None),
    ],
)
def test_not_splittable(body: dict[str, object], why: str | None) -> None:
    assert not_splittable(body) == why
