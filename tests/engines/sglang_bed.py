"""The fleet of the SGLang suite: workers of both engines to split over, in any pair.

Starting SGLang costs minutes of CPU time, so all tests share one fleet, and the gateway is started
anew before the workers that a test is about.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import yaml

from disagg_plugins.handoff.tickets import mint
from disagg_plugins.types import HandoffId
from disagg_sglang.room import Room, pack_room
from tests.engines.probes import post, status, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

MODELS = Path(__file__).resolve().parents[2] / ".models"
SGLANG_FLAGS = ("--dtype", "float32", "--context-length", "2048", "--enable-metrics")
VLLM_FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
LEASE_S = 6.0
INTRODUCED_S = 30.0
"""Workers introduce themselves every 10 s."""

SERVERS = (
    Server("prefill", "prefill", (0,), ("--chunked-prefill-size", "256"), engine="sglang"),
    Server(
        "decode",
        "decode",
        (1,),
        ("--disaggregation-decode-enable-radix-cache", "--enable-pd-role-switch"),
        engine="sglang",
    ),
    Server("whole", "both", (0,), engine="sglang"),
    Server("vllm-prefill", "prefill", (0,)),
    Server("vllm-decode", "decode", (1,), ("--block-size", "32")),
    Server("vllm-tiny", "prefill", (0,), model=MODELS / "tiny"),
)
"""``whole`` is SGLang unsplit: it serves what cannot be split, and is what splits are compared
with. ``vllm-decode`` serves whole requests as well; its blocks hold 32 tokens, those of
``vllm-prefill`` 128, as vLLM chooses on CPUs. ``vllm-tiny`` has another model."""

POLICY = {
    "scheduler": {"split": {"min_prompt_tokens": 0}},
    "handoff": {"lease_s": LEASE_S},
    "gateway": {"prefill_s": 30},
}


def make_bed(folder: Path) -> Testbed:
    """Return the fleet, not started."""
    return Testbed(
        folder,
        MODELS / "SmolLM2-135M-Instruct",
        SERVERS,
        flags=VLLM_FLAGS,
        sglang_flags=SGLANG_FLAGS,
        policy=POLICY,
    )


def select(bed: Testbed, *names: str) -> None:
    """Start the gateway anew before these workers, and wait until they have told of themselves."""
    bed.stop_gateway()
    everything = yaml.safe_load((bed.folder / "start.yaml").read_text())
    workers = [w for w in everything["fleet"]["workers"] if w["name"] in names]
    bed.policy_path.write_text(
        yaml.safe_dump({**everything, "fleet": {**everything["fleet"], "workers": workers}})
    )
    bed.start_gateway()
    bed.wait_ready()
    until(lambda: all(map(introduced, status(bed)["workers"])), "the workers", INTRODUCED_S)


def introduced(worker: dict[str, Any]) -> bool:
    """Return whether a worker has said where it serves KV; SGLang unsplit never does."""
    return worker["hello"] is not None or (worker["engine"], worker["role"]) == ("sglang", "both")


def endpoints_of(bed: Testbed, worker: str = "prefill") -> list[dict[str, Any]]:
    """Return where a worker serves KV."""
    return [w["hello"]["endpoint"] for w in status(bed)["workers"] if w["name"] == worker]


def ticket_of(
    handoff_id: str, *, valid_s: float = 60.0, secret: str = "", prefill: str = "prefill"
) -> str:
    """Return a ticket as the gateway would mint it, or not quite."""
    return mint(
        (secret or os.environ["DISAGG_SECRET"]).encode(),
        handoff_id=HandoffId(handoff_id),
        prefill=prefill,
        decode="decode",
        now_s=time.time(),
        valid_s=valid_s,
    )


def by_hand(
    bed: Testbed, worker: str, prompt: list[int], handoff_id: str, **room: Any
) -> tuple[int, Any]:
    """Send one worker its half of a handoff."""
    room.setdefault("ticket", ticket_of(handoff_id))
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
        "bootstrap_host": pack_room(Room(**room)),
        "bootstrap_room": int(handoff_id[:15], 16),
    }
    return post(bed.urls[worker], "/v1/completions", body)
