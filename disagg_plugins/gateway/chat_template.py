"""A model's own chat template, rendered as transformers renders it.

The template is the operator's, the messages are the clients'. It runs in a sandbox that changes
nothing; what a client can make of it is bounded by bounding what comes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from jinja2.parser import Parser

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
MAX_FILE_BYTES = 16 << 20
"""A ``tokenizer_config.json`` that lists thousands of added tokens has a few MiB."""

Rendering = Callable[[Mapping[str, object]], str]
"""From the fields of a chat request to the prompt's text; raises whatever the template raises."""


def load_chat_template(folder: Path) -> Rendering | None:
    """Return what renders chats, or None when the model has no template.

    Raises:
        ConfigError: A file cannot be read, or the template is none.
        ImportError: jinja2 is not installed.
    """
    config = _json(folder / "tokenizer_config.json")
    source = _text(folder / "chat_template.jinja") or _named(config.get("chat_template"))
    if source is None:
        return None
    special = {key: _content(config.get(key)) for key in SPECIAL_TOKENS if config.get(key)}
    return _compiled(source, special)


def _compiled(source: str, special: Mapping[str, str]) -> Rendering:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's part for training; here it is its content."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except TemplateError as exc:
        raise ConfigError(f"the model's chat template is not valid: {exc}") from exc

    def render(fields: Mapping[str, object]) -> str:
        return template.render(**{**special, **fields})

    return render


def chat_fields(body: Mapping[str, object]) -> dict[str, object]:
    """Return what a template is given of a chat request, in the form the engines give it.

    Raises:
        ValueError: The engine would do something that is not followed here.
    """
    if body.get("chat_template") is not None:
        raise ValueError("the request brings a template of its own")
    if body.get("continue_final_message") or body.get("documents") is not None:
        raise ValueError("the request has fields that change its rendering")
    more = body.get("chat_template_kwargs")
    add = body.get("add_generation_prompt")
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise ValueError("messages are no list")
    return {
        **(more if isinstance(more, dict) else {}),
        "messages": [_message(message) for message in messages],
        "tools": body.get("tools") or None,
        "documents": None,
        "add_generation_prompt": True if add is None else bool(add),
    }


def _message(message: object) -> dict[str, object]:
    if not isinstance(message, dict):
        raise ValueError("a message is no object")
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content")
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a message holds more than text")
        plain["content"] = "\n".join(map(str, texts))  # as vLLM joins them
    calls = plain.get("tool_calls")
    if isinstance(calls, list):
        plain["tool_calls"] = [_call(call) for call in calls]
    return plain


def _call(call: object) -> object:
    """Return a tool call with its arguments as an object, which is what templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)  # what is no JSON raises a ValueError
    return {**call, "function": {**function, "arguments": arguments}}


def _named(template: object) -> str | None:
    if isinstance(template, str):
        return template
    for each in template if isinstance(template, Sequence) else ():
        if isinstance(each, dict) and each.get("name") == "default":
            return _named(each.get("template"))
    return None


def _content(token: object) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _text(path: Path) -> str | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc


def _json(path: Path) -> Mapping[str, object]:
    try:
        found: object = json.loads(_text(path) or "{}")
    except ValueError as exc:
        raise ConfigError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no object")
    return found
