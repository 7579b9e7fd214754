"""Unequal tensor-parallel sizes on the two sides, on real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import parity
from tests.corpus import prompts
from tests.engines.client import complete
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "tp2"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
TP2 = ("--tensor-parallel-size", "2")


@pytest.mark.parametrize(("prefill_size", "decode_size"), [(2, 1), (1, 2)])
def test_answers_are_equal_over_unequal_ranks(
    tmp_path: Path, prefill_size: int, decode_size: int
) -> None:
    cpus = {1: (0,), 2: (0, 1)}
    flags = {1: (), 2: TP2}
    servers = [
        Server("prefill", "prefill", cpus[prefill_size], flags[prefill_size]),
        Server("decode", "decode", cpus[decode_size], flags[decode_size]),
    ]
    policy = {
        "scheduler": {"split": {"min_prompt_tokens": 64}},
        # Three ranks that wait for each other by spinning leave two cores little for anyone else.
        "handoff": {"connect_s": 30, "read_s": 30, "load_s": 90, "lease_s": 90},
    }
    with Testbed(tmp_path, MODEL, servers, flags=FLAGS, policy=policy) as bed:
        for i, text in enumerate(prompts([200, 600], seed=prefill_size)):
            split = parity.cold(bed, text, 16, f"tp-{i}")
            # The prefill worker without a handoff is a plain vLLM.
            whole = complete(bed.urls["prefill"], text, max_tokens=16, model=MODEL_NAME)
            assert parity.compare(split, whole) != "different"
            handoff = parity.record_of(bed, f"tp-{i}")["handoff"]
            assert handoff["outcome"] == "consumed", handoff
            assert handoff["form"] == "canonical"
            assert handoff["tokens_loaded"] == split.usage["prompt_tokens"] - 1
