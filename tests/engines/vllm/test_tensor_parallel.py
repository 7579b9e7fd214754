"""Unequal tensor-parallel sizes on the two sides, on real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def bed(tmp_path: Path, sizes: tuple[int, int]) -> Iterator[Testbed]:
    cpus = {1: (0,), 2: (0, 1)}
    flags = {1: (), 2: TP2}
    servers = [
        Server(role, role, cpus[size], flags[size])
        for role, size in zip(("prefill", "decode"), sizes, strict=True)
    ]
    policy = {
        "scheduler": {"split": {"min_prompt_tokens": 64}},
        # Three ranks that wait for each other by spinning leave two cores little for anyone else.
        "handoff": {"connect_s": 30, "read_s": 30, "load_s": 90, "lease_s": 90},
    }
    with Testbed(tmp_path, MODEL, servers, flags=FLAGS, policy=policy) as testbed:
        yield testbed


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=lambda sizes: "-".join(map(str, sizes)))
def test_answers_are_equal_over_unequal_ranks(bed: Testbed, sizes: tuple[int, int]) -> None:
    for i, text in enumerate(prompts([200, 600], seed=sizes[0])):
        split = parity.cold(bed, text, 16, f"tp-{i}")
        # The prefill worker without a handoff is a plain vLLM.
        whole = complete(bed.urls["prefill"], text, max_tokens=16, model=MODEL_NAME)
        assert parity.compare(split, whole) != "different"
        handoff = parity.record_of(bed, f"tp-{i}")["handoff"]
        assert handoff["outcome"] == "consumed", handoff
        assert handoff["form"] == "canonical"
        assert handoff["tokens_loaded"] == split.usage["prompt_tokens"] - 1
