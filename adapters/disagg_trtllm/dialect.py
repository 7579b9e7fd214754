"""How the gateway speaks to TensorRT-LLM with this project's KV connector. Imports no engine.

Both halves of a request are ordinary ones under one ``disagg_request_id``; everything else that the
connector has to know is announced to it before (``gateway/announcing.py``). The decode worker is
sent the same prompt: it loads all but the last token, and samples the first one itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway.dialect import Published
from disagg_plugins.gateway.openai import not_splittable

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.types import Family, Role

KEY = "disaggregated_params"
VERSION = 1
LEAST_ID = 1 << 40
"""TensorRT-LLM counts its own requests below (``MIN_GLOBAL_ID``)."""

FOR_DECODE_ONLY = ("stream_options", "logprobs", "top_logprobs")
"""Fields that the prefill request leaves out: they ask for output."""


def request_id_of(ref: HandoffRef) -> int:
    """Return the number by which both engines know the handoff's request: 41 to 63 bits."""
    return ref.room | LEAST_ID


class TrtllmDialect:
    """TensorRT-LLM 1.2 and later with ``disagg_trtllm.connector``."""

    engine: str = "trtllm"
    family: Family = "relay"
    decode_is_whole: bool = True
    answers_endpoints: bool = False

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request cannot be split, or None."""
        if body.get(KEY) is not None:
            return f"the client set {KEY}"
        return not_splittable(body)

    def unsplittable_across(self, body: Body) -> str | None:
        """Return why the engine cannot go on from another engine's KV, or None."""
        return None if body.get("lora_path") is None else "lora_path, which it does not know"

    def local_body(self, body: Body) -> Body:
        """Return ``body`` without what reaches the connector."""
        return body if KEY not in body else {k: v for k, v in body.items() if k != KEY}

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        """Return the request for one token, which the decode worker samples anew."""
        clean = self._numbered(body, ref)
        for key in FOR_DECODE_ONLY:
            clean.pop(key, None)
        clean["stream"] = False
        clean["max_tokens"] = 1
        if "max_completion_tokens" in clean:
            clean["max_completion_tokens"] = 1
        if isinstance(least := body.get("min_tokens"), int):
            clean["min_tokens"] = min(least, 1)
        return clean

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        """Return how many tokens were read; whose they are the publisher tells with the KV.

        Raises:
            RemoteProtocolError: The answer tells no usage.
        """
        usage = answer.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(tokens) is not int or tokens < 1:
            raise RemoteProtocolError(
                f"the prefill worker's answer tells prompt_tokens {tokens!r:.40}: nothing says "
                "how many tokens were read"
            )
        return Published(tokens, ref.endpoints)

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the client's request under the handoff's number."""
        return self._numbered(body, ref)

    def _numbered(self, body: Body, ref: HandoffRef) -> Body:
        clean = dict(self.local_body(body))
        clean[KEY] = {
            "request_type": "context_and_generation",
            "disagg_request_id": request_id_of(ref),
        }
        return clean

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        """Return None: a server with the connector does both phases all the time."""
        return None

    def announcement(
        self, step: Literal["prefill", "decode"], ref: HandoffRef, published: Published | None
    ) -> Body:
        """Return what the connector is told.

        Raises:
            LocalProtocolError: Nothing was published: decode is called after its prefill.
        """
        told: Body = {
            "version": VERSION,
            "step": step,
            "request_id": request_id_of(ref),
            "ticket": ref.ticket,
        }
        if step == "prefill":
            return told
        if published is None:
            raise LocalProtocolError("a relayed decode needs what the prefill worker answered")
        return {
            **told,
            "num_tokens": published.num_tokens,
            "prompt": published.prompt,
            "endpoints": list(published.endpoints),
        }
