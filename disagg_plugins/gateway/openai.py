"""What the gateway reads from and writes in the OpenAI API: requests, estimates, errors.

Only fields that routing needs are looked at; everything else passes through untouched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from disagg_plugins.gateway.body import Body, read_body
from disagg_plugins.gateway.refusals import RequestError

if TYPE_CHECKING:
    from disagg_plugins.types import TokensBy

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

MESSAGE_OVERHEAD_TOKENS = 4
"""Estimate of the chat template's tokens around one message (role, separators)."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as far as the gateway understands it.

    Attributes:
        endpoint: ``COMPLETIONS`` or ``CHAT``.
        body: The JSON object; values are decoded when they are asked for.
        raw: Its bytes as received.
        model: The model named, or None.
        stream: Whether a stream is asked for.
        prompt_tokens: Count, or estimate unless ``exact``.
        exact: Whether the prompt came as token ids.
        max_output_tokens: The output bound, or None.
        tenant: OpenAI's ``user`` field, or None.
        batch: Whether several prompts were given; each is answered by a choice of its own.
        opaque: Why the prompt was not read, or None; its token count is then a rough estimate.
        tokens_by: How the count came about.
        prefix_hashes: Hashes of the prompt's leading pieces, longest last.
        session: What ties the requests of one conversation together, or None.
    """

    endpoint: str
    body: Body
    raw: bytes
    model: str | None
    stream: bool
    prompt_tokens: int
    exact: bool
    max_output_tokens: int | None
    tenant: str | None
    batch: bool = False
    opaque: str | None = None
    tokens_by: TokensBy = "estimate"
    prefix_hashes: tuple[str, ...] = ()
    session: str | None = None

    @property
    def single(self) -> bool:
        """Whether the answer has one choice only."""
        return not self.batch and self.body.get("n") in (None, 1)


def parse_request(
    endpoint: str, raw: bytes, *, chars_per_token: float, body: Body | None = None
) -> ParsedRequest:
    """Read a request body.

    Args:
        endpoint: ``COMPLETIONS`` or ``CHAT``.
        raw: The body.
        chars_per_token: By which a text's tokens are estimated.
        body: The same, where it was read already.

    Raises:
        RequestError: 400; the body is not a JSON object, or a field that routing needs has a
            wrong type.
    """
    body = read_body(raw) if body is None else body
    model = _typed(body, "model", str, "a string")
    stream = _typed(body, "stream", bool, "a boolean")
    user = _typed(body, "user", str, "a string")
    bound = _typed(body, "max_completion_tokens", int, "an integer")
    if bound is None:
        bound = _typed(body, "max_tokens", int, "an integer")
    _typed(body, "n", int, "an integer")
    if body.crowded:
        return _unread(endpoint, body, raw, model, bool(stream), bound, user, chars_per_token)
    if endpoint == CHAT:
        tokens, exact = _chat_tokens(body, chars_per_token), False
    else:
        tokens, exact = _prompt_tokens(body, chars_per_token)
    prompt = body.get("prompt")
    batch = isinstance(prompt, list) and len(prompt) > 1 and not exact
    return ParsedRequest(
        endpoint,
        body,
        raw,
        model,
        bool(stream),
        tokens,
        exact,
        bound,
        user,
        batch,
        tokens_by="ids" if exact else "estimate",
    )


def _unread(
    endpoint: str,
    body: Body,
    raw: bytes,
    model: str | None,
    stream: bool,
    bound: int | None,
    user: str | None,
    chars_per_token: float,
) -> ParsedRequest:
    """Return a request whose prompt would cost too much to look at; its worker judges it."""
    key = "messages" if endpoint == CHAT else "prompt"
    size_bytes = body.raw_bytes(key)
    if not size_bytes:
        raise RequestError(400, f"the body has no {key}", param=key)
    tokens = math.ceil(size_bytes / chars_per_token)
    why = "a body too crowded to read"
    return ParsedRequest(
        endpoint, body, raw, model, stream, tokens, False, bound, user, batch=True, opaque=why
    )


def _typed(body: Body, key: str, kind: type[_T], words: str) -> _T | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RequestError(
            400, f"{key} must be {words}, not {type(value).__name__}", code="wrong_type", param=key
        )
    return value


def _prompt_tokens(body: Body, chars_per_token: float) -> tuple[int, bool]:
    """Count or estimate the tokens of a completion prompt; a batch counts as their sum."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return math.ceil(len(prompt) / chars_per_token), False
    if prompt is None and "prompt_embeds" in body:
        return 0, False
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            400,
            "prompt must be a string, a list of token ids, or a list of either",
            code="wrong_type",
            param="prompt",
        )
    if type(prompt[0]) is int:
        if set(map(type, prompt)) != {int}:
            raise RequestError(400, "prompt mixes token ids with other values", param="prompt")
        return len(prompt), True
    if set(map(type, prompt)) == {str}:
        return math.ceil(sum(map(len, prompt)) / chars_per_token), False
    total = 0
    for item in prompt:
        if isinstance(item, str):
            total += math.ceil(len(item) / chars_per_token)
        elif isinstance(item, list):
            total += len(item)
        else:
            raise RequestError(400, "prompt holds values of a wrong type", param="prompt")
    return total, False


def _chat_tokens(body: Body, chars_per_token: float) -> int:
    """Estimate the tokens of a chat prompt from the text of its messages and tools."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list of at least one message", param="messages")
    chars = 0
    for message in messages:
        if not isinstance(message, dict):
            raise RequestError(400, "each message must be an object", param="messages")
        content = message.get("content")
        if isinstance(content, str):
            chars += len(content)
        elif isinstance(content, list):
            for part in content:
                text = part.get("text") if isinstance(part, dict) else None
                chars += len(text) if isinstance(text, str) else 0
    chars += body.raw_bytes("tools")
    return math.ceil(chars / chars_per_token) + MESSAGE_OVERHEAD_TOKENS * len(messages)


def not_splittable(body: dict[str, object]) -> str | None:
    """Return why no engine of this release can split the request, or None.

    What is common to all dialects; each may add reasons of its own.
    """
    for key, reason in (("n", "n > 1"), ("best_of", "best_of > 1")):
        value = body.get(key)
        if isinstance(value, int) and value > 1:
            return reason
    for key in ("echo", "suffix", "prompt_embeds", "use_beam_search"):
        if body.get(key):
            return key
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return "a batch of prompts"
    return _chat_not_splittable(body)


def _chat_not_splittable(body: dict[str, object]) -> str | None:
    # A forced tool call is parsed by the engine when the answer ends; the prefill answer of one
    # token would not parse.
    choice = body.get("tool_choice")
    if choice == "required" or isinstance(choice, dict):
        return "a forced tool call"
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                return "message content other than text"
    return None
