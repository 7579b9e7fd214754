"""How the gateway speaks to TensorRT-LLM's own disaggregated serving: its cache transceiver.

The context server is asked with ``context_only`` and answers with parameters that nobody here looks
into; the generation server gets them back with ``generation_only``. Where the context server has
ended the answer already, because an end token came first, its answer is the client's. Imports no
engine.

From ``tensorrt_llm/serve/openai_disagg_service.py`` at 00bb903d, context first. Written against the
published interface, exercised on servers that follow it, not run on TensorRT-LLM here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.gateway.dialect import Published
from disagg_plugins.gateway.openai import not_splittable
from disagg_trtllm.dialect import KEY, request_id_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.types import Family, Role

GOES_ON = ("length", "not_finished")
"""Reasons by which a context server ends that leave the rest to the generation server."""

ENDED = ("stop", "tool_calls", "function_call", "content_filter")
"""Reasons by which an answer is over. Any other (a time-out, none) is a failure of that server."""

MAX_STATE_CHARS = 8 << 20
"""Of the parameters' opaque text; in use are some KiB. All of it goes to the generation server."""

PROMPT_IDS = "prompt_token_ids"


class NativeTrtllmDialect:
    """TensorRT-LLM with ``cache_transceiver_config`` on both servers."""

    engine: str = "trtllm-native"
    family: Family = "relay"
    crosses: bool = False
    own_transport: bool = True
    decode_is_whole: bool = True
    answers_endpoints: bool = True

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request cannot be split, or None."""
        if body.get(KEY) is not None:
            return f"the client set {KEY}"
        return not_splittable(body)

    def unsplittable_across(self, body: Body) -> str | None:
        """Return that it cannot: its KV travels by TensorRT-LLM's own means."""
        return "trtllm-native workers hand over to each other only (engine trtllm to any)"

    def local_body(self, body: Body) -> Body:
        """Return ``body`` without parameters of a handoff."""
        return body if KEY not in body else {k: v for k, v in body.items() if k != KEY}

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        """Return the request for the context server, which writes one token in any case."""
        clean = dict(self.local_body(body))
        clean["stream"] = False
        clean["stream_options"] = None
        clean[KEY] = {
            "request_type": "context_only",
            "disagg_request_id": request_id_of(ref),
            "schedule_style": 0,
        }
        return clean

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        """Return the parameters of the answer, or the answer where it is the client's.

        Raises:
            RemoteProtocolError: It is neither.
        """
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise RemoteProtocolError("the context server's answer has not exactly one choice")
        choice = choices[0]
        reason = choice.get("finish_reason")
        if reason not in (*GOES_ON, *ENDED):
            raise RemoteProtocolError(f"the context server ended with {reason!r:.40}")
        if reason in ENDED:
            return Published(_read(answer), (), answer=_for_the_client(answer, choice))
        params = choice.get(KEY)
        if not isinstance(params, dict):
            raise RemoteProtocolError(
                f"the context server's answer has no {KEY}: the split is configured but does not "
                "happen; start it with cache_transceiver_config"
            )
        _check(params, request_id_of(ref))
        ids = answer.get(PROMPT_IDS)
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise RemoteProtocolError(f"the context server's answer has no {PROMPT_IDS}")
        opaque = {KEY: params, PROMPT_IDS: ids}
        return Published(_read(answer), (), opaque=opaque)

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the request for the generation server: every parameter as it came.

        Raises:
            LocalProtocolError: Nothing was published.
        """
        params = published.opaque.get(KEY) if published is not None else None
        if published is None or not isinstance(params, dict):
            raise LocalProtocolError("generation needs what the context server answered")
        clean = dict(self.local_body(body))
        ids = published.opaque[PROMPT_IDS]
        clean["prompt" if "messages" not in clean else PROMPT_IDS] = ids
        clean[KEY] = {**params, "request_type": "generation_only"}
        return clean

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        """Return None: a server does both phases all the time."""
        return None


def _read(answer: Body) -> int:
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if type(tokens) is not int or tokens < 1:
        raise RemoteProtocolError(f"the context server tells prompt_tokens {tokens!r:.40}")
    return tokens


def _check(params: Mapping[str, object], request_id: int) -> None:
    """Refuse parameters that cannot be those of this handoff; ids are compared exactly."""
    if params.get("ctx_request_id") is None:
        raise RemoteProtocolError(f"{KEY} has no ctx_request_id")
    told = params.get("disagg_request_id")
    if type(told) is not int or told != request_id:
        raise RemoteProtocolError(
            f"{KEY} is of request {told!r:.40}, not {request_id}: ids beyond 2**53 must not pass "
            "through floating point"
        )
    size = sum(len(value) for value in params.values() if isinstance(value, str))
    if size > MAX_STATE_CHARS:
        raise RemoteProtocolError(f"{KEY} has {size} characters, at most {MAX_STATE_CHARS}")


def _for_the_client(answer: Body, choice: Mapping[str, object]) -> Body:
    """Return an answer without what is between the servers."""
    kept = {k: v for k, v in choice.items() if k != KEY}
    return {**{k: v for k, v in answer.items() if k != PROMPT_IDS}, "choices": [kept]}
