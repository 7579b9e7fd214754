"""The fleet of the SGLang suite: workers of both engines to split over, in any pair.

Starting SGLang costs minutes of CPU time, so all tests share one fleet, and the gateway is started
anew before the workers that a test is about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.engines.probes import status, until
from tests.engines.testbed import Server, Testbed

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
    Server("vllm-decode", "decode", (1,)),
    Server("vllm-tiny", "prefill", (0,), model=MODELS / "tiny"),
)
"""``whole`` is SGLang unsplit: it serves what cannot be split, and is what splits are compared
with. ``vllm-decode`` serves whole requests as well. ``vllm-tiny`` has another model."""

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
