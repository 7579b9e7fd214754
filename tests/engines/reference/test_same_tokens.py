"""The reference engine, asked alone, says in float32 what a real vLLM says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.corpus import fixed_corpus, prompts
from tests.engines.client import Completion, complete
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "SmolLM2-135M-Instruct"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
SMALL_CHUNKS = ("--max-num-batched-tokens", "48", "--block-size", "16")
TEXTS = tuple(prompts([5, 30, 120, 400], seed=3, text=fixed_corpus()))
TOKENS = 24


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    servers = [
        Server("vllm", "both", (0,)),
        Server("reference", "both", (1,), engine="reference"),
        Server("chunked", "both", (1,), SMALL_CHUNKS, engine="reference"),
    ]
    folder = tmp_path_factory.mktemp("same")
    with Testbed(folder, MODEL, servers, flags=FLAGS, gateway=False) as testbed:
        yield testbed


def ask(bed: Testbed, name: str, text: str) -> Completion:
    extra = {"return_token_ids": True}
    return complete(
        *(bed.urls[name], text), max_tokens=TOKENS, model=MODEL_NAME, logprobs=None, extra=extra
    )


@pytest.fixture(scope="module")
def expected(bed: Testbed) -> list[Completion]:
    return [ask(bed, "vllm", text) for text in TEXTS]


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_greedy_tokens_are_those_of_vllm(
    bed: Testbed, expected: list[Completion], name: str
) -> None:
    for text, theirs in zip(TEXTS, expected, strict=True):
        ours = ask(bed, name, text)
        assert len(ours.ids) == TOKENS
        assert (ours.ids, ours.text) == (theirs.ids, theirs.text)
        assert ours.usage["prompt_tokens"] == theirs.usage["prompt_tokens"]


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_a_batch_and_a_warm_cache_change_nothing(
    bed: Testbed, expected: list[Completion], name: str
) -> None:
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        ours = list(pool.map(lambda text: ask(bed, name, text), TEXTS))
    assert [each.ids for each in ours] == [each.ids for each in expected]
