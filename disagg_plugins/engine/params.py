"""The record that travels as ``kv_transfer_params["disagg"]`` in HTTP bodies.

It comes from the network: everything is checked, bounded and named before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.handoff.prompts import DIGEST_CHARS

VERSION = 1
MAX_TICKET_CHARS = 1024
MAX_TOKENS = 1 << 26
MAX_ENDPOINTS = 256


@dataclass(frozen=True, slots=True)
class HandoffParams:
    """One request's part in a handoff.

    Attributes:
        step: ``prefill`` (publish what you compute) or ``decode`` (load what was published).
        ticket: The gateway's ticket.
        num_tokens: Prompt tokens published; 0 in a prefill request.
        prompt: Digest of the prompt that was published; empty in a prefill request, and where the
            prefill's engine does not answer with it: then the publisher tells it with the KV.
        endpoints: One record for each prefill rank; empty in a prefill request.
    """

    step: Literal["prefill", "decode"]
    ticket: str
    num_tokens: int = 0
    prompt: str = ""
    endpoints: tuple[Mapping[str, object], ...] = ()


def read_params(params: object) -> HandoffParams | None:
    """Return the handoff part of an engine request's ``kv_transfer_params``.

    Args:
        params: What the client of the engine sent, of any shape.

    Returns:
        None when the request carries no handoff of ours.

    Raises:
        RemoteProtocolError: It carries one that breaks the rules.
    """
    if not isinstance(params, Mapping) or "disagg" not in params:
        return None
    record = params["disagg"]
    if not isinstance(record, Mapping):
        raise RemoteProtocolError(
            f"kv_transfer_params.disagg is a {type(record).__name__}, not an object"
        )
    if record.get("version") != VERSION:
        raise RemoteProtocolError(
            f"kv_transfer_params.disagg has version {record.get('version')!r}, this worker speaks "
            f"{VERSION}: run the same release of disagg-plugins on the gateway and the workers"
        )
    step, ticket = record.get("step"), record.get("ticket")
    if step not in ("prefill", "decode"):
        raise RemoteProtocolError(
            f"kv_transfer_params.disagg.step is {step!r}, not prefill or decode"
        )
    if not isinstance(ticket, str) or not 0 < len(ticket) <= MAX_TICKET_CHARS:
        raise RemoteProtocolError("kv_transfer_params.disagg.ticket is missing, empty or too long")
    if step == "prefill":
        return HandoffParams("prefill", ticket)
    num_tokens, endpoints = record.get("num_tokens"), record.get("endpoints")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or len(prompt) not in (0, DIGEST_CHARS):
        raise RemoteProtocolError("kv_transfer_params.disagg.prompt is missing or no digest")
    if not isinstance(num_tokens, int) or not 0 < num_tokens <= MAX_TOKENS:
        raise RemoteProtocolError(f"kv_transfer_params.disagg.num_tokens is {num_tokens!r}")
    if (
        not isinstance(endpoints, list)
        or not 0 < len(endpoints) <= MAX_ENDPOINTS
        or not all(isinstance(e, Mapping) for e in endpoints)
    ):
        raise RemoteProtocolError(
            "kv_transfer_params.disagg.endpoints is not a list of 1 to 256 records"
        )
    return HandoffParams("decode", ticket, num_tokens, prompt, tuple(endpoints))


def answer_params(
    *, num_tokens: int, prompt: str, endpoints: list[dict[str, object]]
) -> dict[str, object]:
    """Return what a prefill worker answers to the gateway, which gives it to decode."""
    record = {
        "version": VERSION,
        "num_tokens": num_tokens,
        "prompt": prompt,
        "endpoints": endpoints,
    }
    return {"disagg": record}
