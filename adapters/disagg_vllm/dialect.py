"""How the gateway speaks to vLLM: ``kv_transfer_params`` in the body, relay family.

Imports no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway.openai import not_splittable
from disagg_plugins.gateway.relay_dialect import KEY, TOKEN_IDS, RelayDialect

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body

PARSED = (
    "stop",
    "tools",
    "logprobs",
    "top_logprobs",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "truncate_prompt_tokens",
    "thinking_token_budget",
    "repetition_detection",
    "presence_penalty",
    "frequency_penalty",
    "vllm_xargs",
    TOKEN_IDS,
)
"""Fields whose effect depends on where the answer began: text that is held back or parsed, and
penalties that count the answer's tokens only. ``repetition_penalty`` counts the prompt's too."""

ZERO_IS_A_WISH = ("logprobs", "truncate_prompt_tokens", "thinking_token_budget")
"""Those of them of which 0 asks for something; ``false`` does not."""

COMPLETION_TOKENS = 16
"""What vLLM 0.32 writes at most for a completion that names no bound
(``CompletionRequest.max_tokens``)."""


class VllmDialect(RelayDialect):
    """vLLM 0.9 and later with ``DisaggConnector``."""

    engine = "vllm"
    remedy = "start the worker with --kv-transfer-config for DisaggConnector"

    def unresumable(self, body: Body, *, chat: bool) -> str | None:
        """Return why another vLLM worker could not go on with the answer, or None."""
        for key in PARSED:
            value = body.get(key)
            if value or (key in ZERO_IS_A_WISH and type(value) is int):
                return key
        return not_splittable(body)

    def output_bound(self, body: Body, *, chat: bool) -> int | None:
        """Return how many tokens vLLM writes at most, or None where only the context bounds it."""
        for key in ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",):
            if isinstance(bound := body.get(key), int):
                return bound
        return None if chat else COMPLETION_TOKENS

    def resumable_body(self, body: Body) -> Body:
        """Return ``body`` with the wish for token ids."""
        return with_ids(body)

    def resume_body(self, body: Body, prompt: list[int], ids: list[int], *, chat: bool) -> Body:
        """Return the request for the rest.

        Chat takes the prompt's ids in ``kv_transfer_params`` (vLLM's ``online_renderer.py``,
        ``_reused_prompt_token_ids``); the messages are not rendered again.

        Raises:
            LocalProtocolError: The answer has reached its bound.
        """
        bound = self.output_bound(body, chat=chat)
        if bound is not None and bound <= len(ids):
            raise LocalProtocolError(f"all {bound} tokens were written, the end is missing")
        clean = with_ids(self.local_body(body))
        for key in ("max_completion_tokens", "max_tokens"):
            if isinstance(asked := body.get(key), int):
                clean[key] = max(1, asked - len(ids))
        if bound is not None and not chat:
            clean["max_tokens"] = bound - len(ids)
        if isinstance(least := body.get("min_tokens"), int):
            clean["min_tokens"] = max(0, least - len(ids))
        if chat:
            clean[KEY] = {"prompt_token_ids": [*prompt, *ids]}
        else:
            clean["prompt"] = [*prompt, *ids]
        return clean


def with_ids(body: Body) -> Body:
    """Return a copy of ``body`` that asks for token ids."""
    clean = dict(body.items())
    clean[TOKEN_IDS] = True
    return clean
