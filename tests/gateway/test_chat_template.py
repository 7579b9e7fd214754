"""Chat templates, rendered as the engines render them."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.chat_template import chat_fields, load_chat_template

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}\n"
    "<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hé"}]}


def template(folder, source, **config):
    text = json.dumps({"chat_template": source, "eos_token": {"content": "</s>"}, **config})
    (folder / "tokenizer_config.json").write_text(text)
    return load_chat_template(folder)


def test_a_chat_becomes_the_text_that_the_engine_reads(tmp_path):
    render = template(tmp_path, TEMPLATE)
    assert render(chat_fields(CHAT)) == "<user>hé</s>\n<assistant>"


def test_tools_and_the_clients_own_variables_take_part(tmp_path):
    render = template(tmp_path, TEMPLATE + "{{ mood }}")
    body = {**CHAT, "tools": [{"name": "é"}], "chat_template_kwargs": {"mood": "!"}}
    body["add_generation_prompt"] = False
    assert render(chat_fields(body)) == '[{"name": "é"}]\n<user>hé</s>\n!'


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template(tmp_path, "config")(chat_fields(CHAT)) == "file"


def test_the_default_of_several_templates_is_taken(tmp_path):
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert template(tmp_path, several)(chat_fields(CHAT)) == "yes"


def test_a_model_without_a_template_has_none(tmp_path):
    assert load_chat_template(tmp_path) is None


def test_what_is_no_template_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not valid"):
        template(tmp_path, "{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_chat_template(tmp_path)


def test_a_template_reaches_nothing_outside_its_sandbox(tmp_path):
    render = template(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        render(chat_fields(CHAT))


def test_parts_of_text_are_joined_and_arguments_of_calls_become_objects():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    first, second = chat_fields({"messages": messages})["messages"]
    assert first["content"] == "a\nb"
    assert "content" not in second
    assert second["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "{{ 1 }}"},
        {"continue_final_message": True},
        {"documents": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        {"messages": [3]},
    ],
)
def test_what_the_engine_would_do_otherwise_is_not_guessed(change):
    with pytest.raises(ValueError, match=r"."):
        chat_fields({**CHAT, **change})
