"""Ways to send one prompt through a split, each with what the monolith is asked for comparison."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable
from typing import Any, Literal

from disagg_plugins.handoff.tickets import mint, new_handoff_id
from tests.engines.client import Completion, complete, first_difference, is_tie
from tests.engines.testbed import MODEL_NAME, Testbed, free_ports

TIE_GAP = 1e-4
"""Best tokens closer than this in log-probability are a tie in float32."""

ANSWER_S = 120.0
RECORD_S = 30.0
Verdict = Literal["identical", "tie", "different"]
Send = Callable[..., Completion]
"""``(bed, text, max_tokens, request_id=None)``."""


def cold(bed: Testbed, text: str, max_tokens: int, request_id: str | None = None) -> Completion:
    """Send a prompt that no worker has seen through the gateway."""
    return complete(
        bed.gateway_url,
        text,
        max_tokens=max_tokens,
        model=MODEL_NAME,
        request_id=request_id,
    )


def partly_cached(
    bed: Testbed, text: str, max_tokens: int, request_id: str | None = None
) -> Completion:
    """Let the decode worker compute the first half of the prompt itself before."""
    complete(bed.urls["decode"], text[: len(text) // 2], max_tokens=1, model=MODEL_NAME)
    return cold(bed, text, max_tokens, request_id)


def wholly_cached(
    bed: Testbed, text: str, max_tokens: int, request_id: str | None = None
) -> Completion:
    """Let the decode worker compute the whole prompt itself before."""
    complete(bed.urls["decode"], text, max_tokens=1, model=MODEL_NAME)
    return cold(bed, text, max_tokens, request_id)


def failed_handoff(bed: Testbed, text: str, max_tokens: int) -> Completion:
    """Send the decode worker to a publisher that is not there; it must compute the prompt."""
    answer, ticket = prefill(bed, text)
    dead = {"tcp": f"127.0.0.1:{free_ports(1)[0]}"}
    endpoints = [{**e, "addresses": dead} for e in answer["endpoints"]]
    return decode(bed, text, max_tokens, ticket, {**answer, "endpoints": endpoints})


def mint_ticket(valid_s: float = 60.0) -> str:
    """Return a ticket of this fleet for a new handoff."""
    return mint(
        os.environ["DISAGG_SECRET"].encode(),
        handoff_id=new_handoff_id(),
        prefill="prefill",
        decode="decode",
        now_s=time.time(),
        valid_s=valid_s,
    )


def prefill(
    bed: Testbed, text: str | list[int], ticket: str | None = None
) -> tuple[dict[str, Any], str]:
    """Do the gateway's first half by hand: return the worker's record and the ticket."""
    ticket = ticket or mint_ticket()
    record = {"version": 1, "step": "prefill", "ticket": ticket}
    body = {
        "model": MODEL_NAME,
        "prompt": text,
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {"disagg": record},
    }
    request = urllib.request.Request(
        f"{bed.urls['prefill']}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        params = json.load(answer).get("kv_transfer_params") or {}
    return params.get("disagg", {}), ticket


def decode(
    bed: Testbed, text: str | list[int], max_tokens: int, ticket: str, record: dict[str, Any]
) -> Completion:
    """Do the gateway's second half by hand."""
    params = {"disagg": {**record, "step": "decode", "ticket": ticket}}
    return complete(
        bed.urls["decode"],
        text,
        max_tokens=max_tokens,
        model=MODEL_NAME,
        extra={"kv_transfer_params": params},
    )


def record_of(bed: Testbed, request_id: str) -> dict[str, Any]:
    """Return the gateway's record of a request, once it is written.

    Raises:
        TimeoutError: It is not there after ``RECORD_S``.
    """
    deadline_s = time.monotonic() + RECORD_S
    while time.monotonic() < deadline_s:
        for record in bed.records():
            if record["request_id"] == request_id:
                return record
        time.sleep(0.1)
    raise TimeoutError(f"no record of request {request_id} within {RECORD_S} s")


def compare(split: Completion, monolith: Completion) -> Verdict:
    """Return how two answers to the same prompt relate."""
    position = first_difference(split, monolith)
    if position is None:
        return "identical"
    return "tie" if is_tie(split, monolith, position, gap=TIE_GAP) else "different"
