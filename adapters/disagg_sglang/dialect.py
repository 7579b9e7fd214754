"""How the gateway speaks to SGLang: two SGLang workers are called at once and meet in a room.

Imports no engine. What the backend must know travels in ``bootstrap_host`` (``room.py``); the
number of the room is the handoff's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.dialect import Published
from disagg_plugins.gateway.openai import not_splittable
from disagg_plugins.types import Role
from disagg_sglang.room import Room, pack_room

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef
    from disagg_plugins.types import Family

ROOM_KEYS = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
DP_KEYS = ("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank")
KEYS = (*ROOM_KEYS, *DP_KEYS)
"""Fields of a request that reach SGLang's disaggregation; the gateway alone sets them."""


ALONE = (
    "custom_logit_processor",
    "ebnf",
    "json_schema",
    "regex",
    "session_params",
    "watermark",
)
"""Fields that decide of the KV or of a sampled token and that other engines do not know."""


class SglangDialect:
    """SGLang 0.5.23 with ``--disaggregation-transfer-backend disagg``."""

    engine: str = "sglang"
    family: Family = "rendezvous"
    decode_is_whole: bool = False
    answers_endpoints: bool = False

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request cannot be split, or None."""
        for key in KEYS:
            if body.get(key) is not None:
                return f"the client set {key}"
        if body.get("lora_path") is not None:
            return "a LoRA adapter, which is not part of what the two workers compare"
        return not_splittable(body)

    def unsplittable_across(self, body: Body) -> str | None:
        """Return why the request cannot go on from another engine's first token, or None.

        Another engine's log-probability of that token is not taken over, and it samples the token
        without what only SGLang obeys.
        """
        for key in ALONE:
            if body.get(key) is not None:
                return f"{key}, which the engine that samples the first token does not know"
        for key in ("logprobs", "top_logprobs"):
            value = body.get(key)
            if value is not None and value is not False:
                return f"{key} of a first token that another engine sampled"
        return None

    def local_body(self, body: Body) -> Body:
        """Return ``body`` without anything that reaches a transfer backend."""
        if not any(key in body for key in KEYS):
            return body
        return {k: v for k, v in body.items() if k not in KEYS}

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        """Return the request that computes KV and one token, which decode takes over."""
        clean = dict(self.local_body(body))
        clean.pop("stream_options", None)
        clean["stream"] = False
        return self._with_room(clean, ref, Room(ref.ticket))

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        """Return what SGLang's prefill published: the answer comes when all of it is staged.

        Raises:
            RemoteProtocolError: The answer does not say how long the prompt is.
        """
        usage = answer.get("usage")
        num_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if type(num_tokens) is not int or num_tokens < 1:
            raise RemoteProtocolError(
                f"the prefill worker's answer says prompt_tokens {num_tokens!r:.80}"
            )
        return Published(num_tokens, ref.endpoints)

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the client's request with the ticket and where prefill serves KV."""
        endpoints, token = ref.endpoints, -1
        if published is not None:
            endpoints, token = published.endpoints, published.first_token
        room = Room(ref.ticket, [dict(endpoint) for endpoint in endpoints], token)
        return self._with_room(dict(self.local_body(body)), ref, room)

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        """Return the request by which an idle server takes a role.

        It needs ``--enable-pd-role-switch``. Towards decode it asks how much memory CUDA graphs may
        need before it captures them; 0 lets it capture in what there is.
        """
        if role is Role.BOTH:
            return None
        body: Body = {"new_role": role.value}
        if role is Role.DECODE:
            body["decode_cuda_graph_memory_gb"] = 0
        return "/pd_role_switch", body

    def _with_room(self, body: Body, ref: HandoffRef, room: Room) -> Body:
        body["bootstrap_host"] = pack_room(room)
        body["bootstrap_room"] = ref.room
        return body
