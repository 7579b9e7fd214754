"""How the gateway speaks to TensorRT-LLM with this project's KV connector. Imports no engine.

Both halves of a request are ordinary ones under one ``disagg_request_id``; everything else that the
connector has to know is announced to it before (``gateway/announcing.py``).

A plain completion is decoded from the ids of its prompt and of the token that prefill wrote: all of
the prompt is loaded, none of it computed again. Any other request is sent to the decode worker as
it is, which loads all but the last token and samples the first one itself: two answers cannot be
put together where something looks at the whole text (stop strings, parsers), at the whole count
(penalties, seeds), or at every token (log-probabilities). Nor can chats: a server that did not know
``prompt_token_ids`` would write the first token twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway.dialect import Opening, Published
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

PLAIN = frozenset(
    {
        "model", "prompt", "max_tokens", "stream", "stream_options", "user", "ignore_eos",
        "temperature", "top_p", "top_k", "min_p", "n", "best_of", "echo", "suffix", "logprobs",
        "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
    }
)  # fmt: skip
"""Fields of a completion that can be put together from two."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None,),
    "stop": (None, []),
    "seed": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
"""Values with which these ask for nothing; clients send them all the same."""

INCOMPLETE = "\ufffd"
"""How the beginning of a character is shown."""


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
        return Published(_read(answer), ref.endpoints)

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the client's request under the handoff's number."""
        return self._numbered(body, ref)

    # What prefill wrote

    def opens(self, body: Body, *, chat: bool) -> bool:
        """Return whether decode may go on from the token that prefill writes."""
        keys = set(dict(body.items())) - {KEY}
        bound = body.get("max_tokens")
        return (
            not chat
            and keys <= PLAIN
            and type(bound) is int
            and bound > 1
            and all(body.get(key) in values for key, values in NEUTRAL.items())
        )

    def question(self, ref: HandoffRef) -> Body:
        """Return the question for the ids of the prompt and of the first token."""
        return {
            "version": VERSION,
            "step": "opening",
            "request_id": request_id_of(ref),
            "ticket": ref.ticket,
        }

    def opening(self, told: Body, answer: Body) -> Opening:
        """Return the beginning of the answer.

        Raises:
            RemoteProtocolError: Prefill has ended the answer, its text is part of a character, or
                what is told cannot be.
        """
        prompt, token = told.get("prompt"), told.get("token")
        if not isinstance(prompt, list) or not all(map(_is_token, prompt)):
            raise RemoteProtocolError(f"the prompt is told as {prompt!r:.60}")
        if len(prompt) != (read := _read(answer)):
            raise RemoteProtocolError(f"{len(prompt)} prompt tokens are told, and {read} were read")
        if not isinstance(token, int) or not _is_token(token):
            raise RemoteProtocolError(f"the first token is told as {token!r:.40}")
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        if not isinstance(choice, dict) or choice.get("finish_reason") != "length":
            raise RemoteProtocolError("the prefill worker has ended the answer")
        text = choice.get("text")
        if not isinstance(text, str) or not text or text.endswith(INCOMPLETE):
            raise RemoteProtocolError(f"the first token's text is {text!r:.40}")
        return Opening(prompt, token, text)

    def continued_body(self, body: Body, ref: HandoffRef, opening: Opening) -> Body:
        """Return the request for what follows the first token."""
        clean = self._numbered(body, ref)
        clean["prompt"] = [*opening.prompt, opening.token]
        if isinstance(bound := body.get("max_tokens"), int):
            clean["max_tokens"] = bound - 1
        return clean

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


def _is_token(told: object) -> bool:
    return type(told) is int and 0 <= told < 1 << 32  # as tokenizers have them


def _read(answer: Body) -> int:
    """Return how many prompt tokens an answer says were read."""
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if type(tokens) is not int or tokens < 1:
        raise RemoteProtocolError(
            f"the prefill worker's answer tells prompt_tokens {tokens!r:.40}: nothing says how "
            "many tokens were read"
        )
    return tokens
