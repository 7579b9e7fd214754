"""Prompts counted with a tokenizer as the engines count them."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from disagg_plugins.gateway import token_counter
from disagg_plugins.gateway.openai import CHAT, COMPLETIONS, parse_request
from disagg_plugins.gateway.token_counter import (
    MAX_CHARS,
    MAX_MESSAGES,
    MAX_WAITING,
    load_token_counter,
)
from tests.gateway.tokenizers_made import make_tokenizer


@pytest.fixture
def counter(tmp_path):
    counter = load_token_counter(make_tokenizer(tmp_path / "model"))
    yield counter
    counter.close()


def prepared(counter, endpoint=COMPLETIONS, **body):
    raw = json.dumps(body).encode()
    return counter.prepare(parse_request(endpoint, raw, chars_per_token=4.0))


def test_a_completion_begins_with_the_models_special_tokens_unless_told_otherwise(counter):
    assert prepared(counter, prompt="word hello").ids() == [4, 0, 1]
    assert prepared(counter, prompt=["word hello"]).ids() == [4, 0, 1]
    assert prepared(counter, prompt="word", add_special_tokens=False).ids() == [0]


def test_a_chat_has_what_its_template_writes(counter):
    messages = [{"role": "user", "content": "word"}]
    assert prepared(counter, CHAT, messages=messages).ids() == [2, 0, 3]


def test_a_long_prompt_is_to_be_counted_elsewhere_and_an_endless_one_not_at_all(counter):
    assert prepared(counter, prompt="word").short
    long = prepared(counter, prompt="word " * 1000)
    assert not long.short
    assert len(long.ids()) == 1001
    assert prepared(counter, prompt="a" * (MAX_CHARS + 1)) is None
    roles = [{"role": "a" * MAX_CHARS, "content": "b"}]
    assert prepared(counter, CHAT, messages=roles) is None


def test_many_empty_messages_are_not_counted_at_once(counter):
    empty = {"role": "", "content": ""}
    assert prepared(counter, CHAT, messages=[empty] * 10).short
    assert not prepared(counter, CHAT, messages=[empty] * 100).short
    assert not prepared(counter, CHAT, messages=[{"tool_calls": [{}] * 100}]).short
    assert prepared(counter, CHAT, messages=[empty] * (MAX_MESSAGES + 1)) is None


def test_what_else_a_client_gives_a_template_counts_as_long_as_it_is(counter):
    messages = [{"role": "user", "content": "word"}]
    more = {"custom_tools": ["a" * 3000]}
    assert not prepared(counter, CHAT, messages=messages, chat_template_kwargs=more).short


def test_arguments_of_a_tool_call_that_are_too_deep_leave_the_estimate(counter):
    call = {"function": {"name": "f", "arguments": "[" * 5000 + "]" * 5000}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    assert prepared(counter, CHAT, messages=messages) is None


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (COMPLETIONS, {"prompt": [1, 2]}),
        (COMPLETIONS, {"prompt": ["a", "b"]}),
        (COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": 1}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ],
)
def test_what_cannot_be_counted_is_left_to_the_estimate(counter, endpoint, body):
    assert prepared(counter, endpoint, **body) is None


def test_a_template_that_fails_at_a_message_leaves_the_estimate_and_tells_once(tmp_path, caplog):
    folder = make_tokenizer(tmp_path / "model")
    config = {"chat_template": "{{ raise_exception('no system') }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    counter = load_token_counter(folder)
    for _ in range(3):
        messages = [{"role": "user", "content": "word"}]
        assert prepared(counter, CHAT, messages=messages).ids() is None
    counter.close()
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert sum("no system" in r.getMessage() for r in warned) == 1


def test_more_prompts_than_may_wait_are_refused(counter):
    gate = threading.Event()
    futures = [counter.submit(gate.wait) for _ in range(MAX_WAITING)]
    assert counter.submit(gate.wait) is None
    gate.set()
    for future in futures:
        future.result(10)
        counter.left()
    assert counter.submit(gate.wait).result(10)


def test_a_file_alone_will_do_for_completions(tmp_path, caplog):
    folder = make_tokenizer(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    counter = load_token_counter(folder / "tokenizer.json")
    assert prepared(counter, prompt="word").ids() == [4, 0]
    assert prepared(counter, CHAT, messages=[{"role": "user", "content": "word"}]) is None
    assert "has no chat template" in caplog.text
    counter.close()


def test_what_cannot_be_loaded_is_told_with_what_to_do(tmp_path, caplog, monkeypatch):
    assert load_token_counter(tmp_path) is None
    assert "there is no" in caplog.text
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_token_counter(tmp_path) is None
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_token_counter(tmp_path) is None
    assert "pip install 'disagg-plugins[tokenizer]'" in caplog.text
    assert token_counter.log.name in {record.name for record in caplog.records}
