"""The dialect of engines whose bodies carry ``kv_transfer_params`` as vLLM's do, relay family.

The prefill worker is asked for one token and answers with the record that its adapter made
(``engine/params.py``); the gateway gives that record and the ticket to the decode worker.
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
"""Asks for the answer's tokens: where decode runs on another engine, it goes on from them."""


class RelayDialect:
    """See the module; an engine's own dialect names it."""

    engine: str
    family: Family = "relay"
    decode_is_whole: bool = True
    answers_endpoints: bool = True
    remedy: str
    """What to do where a prefill worker publishes nothing, up to "and look in its log"."""

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request cannot be split, or None."""
        if body.get(KEY) is not None:
            return f"the client set {KEY}"
        return not_splittable(body)

    def unsplittable_across(self, body: Body) -> str | None:
        """Return why the engine cannot go on from another engine's KV, or None.

        It reads the last prompt token and samples the first one itself, so only what changes KV
        matters: SGLang's name for an adapter, of which others take no notice.
        """
        if body.get("lora_path") is None:
            return None
        return f"lora_path, which {self.engine} does not know"

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
        """Return the request for one token, which the decode worker samples anew."""
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
                f"not happen; {self.remedy} and look in its log for why it did not publish"
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
            LocalProtocolError: Nothing was published: decode is called after its prefill.
        """
        if published is None:
            raise LocalProtocolError("a relayed decode needs what the prefill worker answered")
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
        """Return None: servers of these engines do both phases all the time."""
        return None


def first_token(answer: Body) -> int:
    """Return the token that prefill sampled.

    Raises:
        RemoteProtocolError: The answer does not tell it.
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    ids = choice.get("token_ids") if isinstance(choice, dict) else None
    if not isinstance(ids, list) or len(ids) != 1 or type(ids[0]) is not int or ids[0] < 0:
        raise RemoteProtocolError(
            f"the prefill worker was asked for one token by {TOKEN_IDS} and told {ids!r:.80}: "
            "another engine cannot go on from its answer; a vLLM may be too old (0.10.2 and "
            "later tell)"
        )
    return ids[0]
