"""The reference engine and the TensorRT-LLM connector hand over to and from a real vLLM.

The connector runs on the reference engine, which hosts it: written against the published
interface, exercised on a host that follows it, not run on TensorRT-LLM here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_plugins.cli.main import main
from tests import parity
from tests.corpus import prompts
from tests.engines.client import complete
from tests.engines.probes import status, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "tp2"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
TWO_RANKS = ("--tensor-parallel-size", "2")
LENGTHS = (20, 500)
TOKENS = 16


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    servers = [
        Server("vllm", "both", (0,)),
        Server("reference", "both", (1,), engine="reference"),
        Server("trtllm", "both", (1,), engine="trtllm"),
        Server("trtllm2", "both", (1,), TWO_RANKS, engine="trtllm"),
        Server("whole", "monolith", (0,)),
    ]
    policy = {"scheduler": {"split": {"rule": "always"}, "tokenizer": str(MODEL)}}
    folder = tmp_path_factory.mktemp("across")
    with Testbed(folder, MODEL, servers, flags=FLAGS, policy=policy) as testbed:
        yield testbed


@pytest.fixture
def pair(bed: Testbed, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Let one worker read all prompts and another one write all answers."""
    prefill, decode = request.param
    others = {"vllm", "reference", "trtllm", "trtllm2"} - {prefill, decode}
    policy = str(bed.policy_path)
    for name in others:
        assert main(["fleet", "drain", policy, name]) == 0
    for name, role in ((decode, "decode"), (prefill, "prefill")):
        assert main(["fleet", "role", policy, name, role]) == 0

    def settled() -> bool:
        workers = {w["name"]: w for w in status(bed)["workers"]}
        roles = (workers[prefill]["role"], workers[decode]["role"])
        return roles == ("prefill", "decode") and all(workers[n]["draining"] for n in others)

    until(settled, "the roles are those of the pair")
    yield prefill, decode
    for name in others:
        assert main(["fleet", "drain", policy, name, "--undo"]) == 0
    for name in (prefill, decode):
        assert main(["fleet", "role", policy, name, "both"]) == 0


PAIRS = [
    ("vllm", "trtllm"),
    ("trtllm", "vllm"),
    ("vllm", "trtllm2"),
    ("trtllm2", "vllm"),
    ("trtllm", "trtllm2"),
    ("vllm", "reference"),
    ("reference", "vllm"),
    ("reference", "trtllm"),
]


@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def test_greedy_answers_are_those_of_vllm_unsplit(bed: Testbed, pair: tuple[str, str]) -> None:
    seed = PAIRS.index(pair) + 10  # prompts that no pair has had
    for i, text in enumerate(prompts(list(LENGTHS), seed=seed)):
        name = f"{'-'.join(pair)}-{i}"
        split, whole = (
            complete(
                url, text, max_tokens=TOKENS, model=MODEL_NAME, logprobs=None, request_id=request_id
            )
            for url, request_id in ((bed.gateway_url, name), (bed.urls["whole"], None))
        )
        record = parity.record_of(bed, name)
        assert (record["prefill"], record["decode"]) == pair
        assert split.text == whole.text
        handoff = record["handoff"]
        assert handoff["outcome"] == "consumed", handoff
        read = split.usage["prompt_tokens"]
        if pair == ("trtllm", "trtllm2"):  # decode goes on from the token that prefill wrote
            assert (handoff["tokens_loaded"], handoff["tokens_recomputed"]) == (read, 0)
        # vLLM counts the last token as loaded, which it computes again
        assert handoff["tokens_loaded"] in (read - 1, read)
