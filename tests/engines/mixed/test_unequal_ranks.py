"""Unequal tensor-parallel sizes on the two sides, with SGLang on at least one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import parity
from tests.corpus import prompts
from tests.engines.client import complete
from tests.engines.testbed import MODEL_NAME, Engine, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "tp2"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
SGLANG_FLAGS = ("--context-length", "1024", "--dtype", "float32")
CPUS = {1: (1,), 2: (0, 1)}
RANKS = {
    ("vllm", 1): (),
    ("vllm", 2): ("--tensor-parallel-size", "2"),
    ("sglang", 1): (),
    ("sglang", 2): ("--tp-size", "2"),
}
POLICY = {
    "scheduler": {"split": {"min_prompt_tokens": 0}},
    # Ranks that wait for each other by spinning leave two cores little for anyone else.
    "handoff": {"connect_s": 30, "read_s": 30, "load_s": 90, "lease_s": 90},
}


@pytest.fixture
def bed(tmp_path: Path, sides: tuple[tuple[Engine, int], ...]) -> Iterator[Testbed]:
    servers = [
        Server(role, role, CPUS[size], RANKS[engine, size], engine=engine)
        for role, (engine, size) in zip(("prefill", "decode"), sides, strict=True)
    ]
    servers.append(Server("whole", "monolith", (0,), engine="sglang"))
    with Testbed(
        tmp_path, MODEL, servers, flags=FLAGS, sglang_flags=SGLANG_FLAGS, policy=POLICY
    ) as testbed:
        yield testbed


@pytest.mark.parametrize(
    "sides",
    [
        (("vllm", 2), ("sglang", 1)),
        (("sglang", 2), ("sglang", 1)),
        (("sglang", 1), ("sglang", 2)),
    ],
    ids=lambda sides: "-to-".join(f"{engine}-{size}" for engine, size in sides),
)
def test_answers_are_equal_over_unequal_ranks(bed: Testbed) -> None:
    for i, text in enumerate(prompts([200, 600], seed=2)):
        answers = [
            complete(url, text, max_tokens=16, model=MODEL_NAME, logprobs=None, request_id=name)
            for url, name in ((bed.gateway_url, f"tp-{i}"), (bed.urls["whole"], None))
        ]
        assert answers[0].text == answers[1].text
        handoff = parity.record_of(bed, f"tp-{i}")["handoff"]
        assert handoff["outcome"] == "consumed", handoff
        assert handoff["form"] == "canonical"
        assert handoff["tokens_loaded"] == answers[0].usage["prompt_tokens"]
