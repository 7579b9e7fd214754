"""How the gateway speaks to vLLM: ``kv_transfer_params`` in the body, relay family.

Imports no engine. The prefill worker is asked for one token and answers with the record that the
connector made (``params.py``); the gateway gives that record and the ticket to the decode worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway.dialect import Published
from disagg_plugins.gateway.openai import not_splittable

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.types import Family, Role

KEY = "kv_transfer_params"
VERSION = 1

FOR_DECODE_ONLY = ("stream_options", "logprobs", "top_logprobs")
"""Fields that the prefill request leaves out: they ask for output."""

TOKEN_IDS = "return_token_ids"
"""Asks vLLM for the answer's tokens: where decode runs on another engine, it goes on from them."""


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


class VllmDialect:
    """vLLM 0.9 and later with ``DisaggConnector``."""

    engine: str = "vllm"
    family: Family = "relay"
    decode_is_whole: bool = True
    answers_endpoints: bool = True

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request cannot be split, or None."""
        if body.get(KEY) is not None:
            return f"the client set {KEY}"
        return not_splittable(body)

    def unsplittable_across(self, body: Body) -> str | None:
        """Return why vLLM cannot go on from another engine's KV, or None.

        It reads the last prompt token and samples the first one itself, so only what changes KV
        matters: SGLang's name for an adapter, of which vLLM takes no notice.
        """
        return None if body.get("lora_path") is None else "lora_path, which vLLM does not know"

    def local_body(self, body: Body) -> Body:
        """Return ``body`` without anything that reaches a KV connector.

        vLLM copies ``vllm_xargs`` and ``kv_transfer_params`` into the same dictionary, so both
        doors are closed.
        """
        xargs = body.get("vllm_xargs")
        inside = isinstance(xargs, dict) and KEY in xargs
        if KEY not in body and not inside:
            return body
        clean = {k: v for k, v in body.items() if k != KEY}
        if isinstance(xargs, dict) and inside:
            clean["vllm_xargs"] = {k: v for k, v in xargs.items() if k != KEY}
        return clean

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        """Return the request for one token, which vLLM's decode samples anew."""
        clean = dict(self.local_body(body))
        for key in FOR_DECODE_ONLY:
            clean.pop(key, None)
        clean["stream"] = False
        clean["max_tokens"] = 1
        if "max_completion_tokens" in clean:
            clean["max_completion_tokens"] = 1
        if isinstance(least := body.get("min_tokens"), int):
            clean["min_tokens"] = min(least, 1)
        if ref.decode.engine != self.engine:
            clean[TOKEN_IDS] = True
        clean[KEY] = {"disagg": {"version": VERSION, "step": "prefill", "ticket": ref.ticket}}
        return clean

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        """Return what the answer's ``kv_transfer_params`` say, checked.

        Raises:
            RemoteProtocolError: They are absent or false.
        """
        params = answer.get(KEY)
        record = params.get("disagg") if isinstance(params, dict) else None
        if not isinstance(params, dict) or not isinstance(record, dict):
            raise RemoteProtocolError(
                "the prefill worker's answer carries no handoff: the split is configured but does "
                "not happen; start the worker with --kv-transfer-config for DisaggConnector and "
                "look in its log for why it did not publish"
            )
        if record.get("version") != VERSION:
            raise RemoteProtocolError(
                f"the prefill worker speaks version {record.get('version')!r} of the handoff "
                f"parameters, this gateway {VERSION}: run the same release on both"
            )
        tokens, endpoints = record.get("num_tokens"), record.get("endpoints")
        if type(tokens) is not int or tokens < 1:
            raise RemoteProtocolError(f"the prefill worker published num_tokens {tokens!r}")
        if not isinstance(endpoints, list) or not endpoints:
            raise RemoteProtocolError("the prefill worker names no endpoint that serves the KV")
        prompt = record.get("prompt")
        return Published(
            tokens,
            tuple(endpoints),
            prompt=prompt if isinstance(prompt, str) else "",
            first_token=-1 if ref.decode.engine == self.engine else first_token(answer),
            opaque={k: v for k, v in params.items() if k != "disagg"},
        )

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the client's request with the ticket and the prefill worker's record.

        Raises:
            LocalProtocolError: Nothing was published: vLLM's decode is called after its prefill.
        """
        if published is None:
            raise LocalProtocolError("vLLM's decode needs what the prefill worker answered")
        clean = dict(self.local_body(body))
        record = {
            "version": VERSION,
            "step": "decode",
            "ticket": ref.ticket,
            "num_tokens": published.num_tokens,
            "prompt": published.prompt,
            "endpoints": list(published.endpoints),
        }
        clean[KEY] = {**published.opaque, "disagg": record}
        return clean

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        """Return None: a server of vLLM with the connector does both phases all the time."""
        return None

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


def first_token(answer: Body) -> int:
    """Return the token that vLLM's prefill sampled.

    Raises:
        RemoteProtocolError: The answer does not tell it.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    ids = choice.get("token_ids") if isinstance(choice, dict) else None
    if not isinstance(ids, list) or len(ids) != 1 or type(ids[0]) is not int or ids[0] < 0:
        raise RemoteProtocolError(
            f"the prefill worker was asked for one token by {TOKEN_IDS} and told {ids!r:.80}: "
            "another engine cannot go on from its answer; this vLLM may be too old (0.10.2 and "
            "later tell)"
        )
    return ids[0]
