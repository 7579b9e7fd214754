"""Do answers change when prefill and decode run on different engines? 30 prompts, every pair.

``make bench NAME=engines [ARGS='--dtype bfloat16']``. Prompts of 20 to 1,900 tokens go through
SGLang to SGLang, vLLM to SGLang and SGLang to vLLM, and to each engine unsplit. A split's answers
are compared with those of its decode engine unsplit; and the two engines with each other, which
tells how much they differ on their own. Every server computes with one thread, so that all round
alike. The last line of the output is one JSON object; for each comparison ``prompts``,
``identical``, and ``first_differences``: positions in the answer, from 0. About fifteen minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.corpus import prompts
from tests.engines import compatibility
from tests.engines.client import AS_IDS, Completion, complete, first_difference
from tests.engines.probes import status
from tests.engines.sglang_bed import select
from tests.engines.testbed import MODEL_NAME, Server, Testbed

MODEL = Path(".models/SmolLM2-135M-Instruct")
SHORTEST_TOKENS, LONGEST_TOKENS = 20, 1900
LIMIT = "2048"

SERVERS = (
    Server("sglang-prefill", "prefill", (0,), engine="sglang"),
    Server("sglang-decode", "decode", (1,), engine="sglang"),
    Server("sglang", "monolith", (0,), engine="sglang"),
    Server("vllm-prefill", "prefill", (0,)),
    Server("vllm-decode", "decode", (1,)),
    Server("vllm", "monolith", (0,)),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Workers to split over, and the unsplit engine to compare with."""

    prefill: str
    decode: str
    alone: str

    @property
    def name(self) -> str:
        """``vllm-sglang``: prefill's engine, decode's engine."""
        return "-".join(worker.partition("-")[0] for worker in (self.prefill, self.decode))


PAIRS = (
    Pair("sglang-prefill", "sglang-decode", "sglang"),
    Pair("vllm-prefill", "sglang-decode", "sglang"),
    Pair("sglang-prefill", "vllm-decode", "vllm"),
)


def say(line: str) -> None:
    """Print progress at once."""
    print(line, file=sys.stderr, flush=True)


def spread_prompts(count: int, seed: int) -> list[str]:
    """Return prompts whose lengths are spread evenly from the shortest to the longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    step = (LONGEST_TOKENS - SHORTEST_TOKENS) / max(1, count - 1)
    lengths = [round(SHORTEST_TOKENS + i * step) for i in range(count)]
    # The corpus gives 0.8 to 1.15 tokens for each one asked for; what is too much is cut off.
    texts = prompts([int(1.4 * length) + 10 for length in lengths], seed=seed)
    return [
        tokenizer.decode(tokenizer(text)["input_ids"][:length])
        for text, length in zip(texts, lengths, strict=True)
    ]


def ask(url: str, text: str, tokens: int, request_id: str | None = None) -> Completion:
    """Return one greedy answer with the ids of its tokens."""
    return complete(
        url,
        text,
        max_tokens=tokens,
        model=MODEL_NAME,
        logprobs=None,
        extra=AS_IDS,
        request_id=request_id,
    )


def compare(ours: list[Completion], theirs: list[Completion]) -> dict[str, Any]:
    """Return how many answers are identical, and where the others part."""
    positions = [first_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    parted = [p for p in positions if p is not None]
    return {
        "prompts": len(positions),
        "identical": len(positions) - len(parted),
        "first_differences": sorted(parted),
    }


def main() -> int:
    """Run every pair and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(".run/engines"))
    args = parser.parse_args()
    texts = spread_prompts(args.prompts, args.seed)
    (args.folder / "records.jsonl").unlink(missing_ok=True)
    answers: dict[str, list[Completion]] = {}
    with Testbed(
        args.folder,
        MODEL,
        SERVERS,
        flags=("--enforce-eager", "--max-model-len", LIMIT, "--dtype", args.dtype),
        sglang_flags=("--context-length", LIMIT, "--dtype", args.dtype),
        policy={"scheduler": {"split": {"min_prompt_tokens": 0}}},
        say=say,
    ) as bed:
        for name in ("sglang", "vllm"):
            answers[name] = []
            for i, text in enumerate(texts):
                answers[name].append(ask(bed.urls[name], text, args.tokens))
                say(f"{name}: {i + 1} of {len(texts)}")
        for pair in PAIRS:
            select(bed, pair.prefill, pair.decode)
            hellos = {w["name"]: w["hello"] for w in status(bed)["workers"]}
            before = len(bed.records())
            answers[pair.name] = []
            for i, text in enumerate(texts):
                name = f"{pair.name}-{i}"
                answers[pair.name].append(ask(bed.gateway_url, text, args.tokens, name))
                where = first_difference(answers[pair.name][-1], answers[pair.alone][i])
                tokens = answers[pair.name][-1].usage.get("prompt_tokens")
                say(f"{pair.name}: {tokens} tokens: {'identical' if where is None else where}")
            records = bed.records()[before:]
            compatibility.merge(compatibility.note(bed, hellos, records, "benchmarks/engines.py"))
    records = {r["request_id"]: r for r in bed.records()}
    handoffs = {
        pair.name: sum(
            (records.get(f"{pair.name}-{i}") or {}).get("split") == "yes" for i in range(len(texts))
        )
        for pair in PAIRS
    }
    prompt_tokens = [a.usage.get("prompt_tokens", 0) for a in answers["vllm"]]
    result = {
        "dtype": args.dtype,
        "prompt_tokens": [min(prompt_tokens), max(prompt_tokens)],
        "handed_over": handoffs,
        **{p.name: compare(answers[p.name], answers[p.alone]) for p in PAIRS},
        "vllm alone to sglang alone": compare(answers["vllm"], answers["sglang"]),
    }
    print(json.dumps(result))
    wrong = [p.name for p in PAIRS if handoffs[p.name] < len(texts)]
    if args.dtype == "float32":
        wrong += [p.name for p in PAIRS if result[p.name]["first_differences"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
