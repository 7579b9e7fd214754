"""A real SGLang prefill worker and a real SGLang decode worker, against SGLang unsplit.

The tests run in the order of this file against one fleet; the last ones kill parts of it. The
unsplit SGLang has the role ``both``: what cannot be split is served there, and it is what the split
is compared with.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_sglang.room import Room, pack_room
from tests import parity
from tests.corpus import prompts
from tests.engines.client import AnswerError, Completion, complete, first_difference
from tests.engines.probes import engine_processes, idle, in_flight, metric, post, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "SmolLM2-135M-Instruct"
FLAGS = ("--dtype", "float32", "--context-length", "2048", "--enable-metrics")
CHUNK_TOKENS = 256
LEASE_S = 6.0
BYTES_A_TOKEN = 2 * 30 * 3 * 64 * 4
"""K and V, 30 layers, 3 KV heads of 64 elements of 4 bytes."""

SERVERS = (
    Server("prefill", "prefill", (0,), ("--chunked-prefill-size", str(CHUNK_TOKENS))),
    Server(
        "decode",
        "decode",
        (1,),
        ("--disaggregation-decode-enable-radix-cache", "--enable-pd-role-switch"),
    ),
    Server("whole", "both", (0,)),
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    policy = {
        "scheduler": {"split": {"min_prompt_tokens": 0}},
        "handoff": {"lease_s": LEASE_S},
        "gateway": {"prefill_s": 30},
    }
    servers = [replace(server, engine="sglang") for server in SERVERS]
    folder = tmp_path_factory.mktemp("sglang")
    with Testbed(folder, MODEL, servers, sglang_flags=FLAGS, policy=policy) as b:
        yield b


def text_of(tokens: int, seed: int) -> str:
    return next(prompts([tokens], seed=seed))


def split(bed: Testbed, prompt: str | list[int], max_tokens: int, **more: Any) -> Completion:
    """Send a request through the gateway while the unsplit worker seems busy, so it is split."""
    more.setdefault("logprobs", None)
    return complete(bed.gateway_url, prompt, max_tokens=max_tokens, model=MODEL_NAME, **more)


def whole(bed: Testbed, prompt: str | list[int], max_tokens: int, **more: Any) -> Completion:
    more.setdefault("logprobs", None)
    return complete(bed.urls["whole"], prompt, max_tokens=max_tokens, model=MODEL_NAME, **more)
