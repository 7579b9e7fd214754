"""Are the answers of a split the monolith's? 60 prompts, 48 greedy tokens each, float32.

``make bench NAME=parity``. Every server computes with one thread (a rank), so that both arms round
alike. The last line of the output is one JSON object: ``prompts``, ``identical``, ``ties``,
``different``, overall and by case. Takes about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import parity
from tests.corpus import prompts
from tests.engines.client import complete, first_difference
from tests.engines.testbed import MODEL_NAME, Server, Testbed

OUTPUT_TOKENS = 48
MODELS = Path(".models")
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")


@dataclass(frozen=True, slots=True)
class Case:
    """A number of prompts sent one way.

    Attributes:
        name: Shown in the result.
        send: How a prompt goes through the split.
        count: Prompts.
        low: Shortest prompt, in tokens.
    """

    name: str
    send: parity.Send
    count: int
    low: int = 300


@dataclass(frozen=True, slots=True)
class Fleet:
    """Servers that run together, and the cases they are good for."""

    model: str
    servers: tuple[Server, ...]
    cases: tuple[Case, ...]


SMOL = "SmolLM2-135M-Instruct"
CHUNKED = ("--max-num-batched-tokens", "256")
TP2 = ("--tensor-parallel-size", "2")
FLEETS = (
    Fleet(
        SMOL,
        (
            Server("prefill", "prefill", (0,)),
            Server("decode", "decode", (1,)),
            Server("monolith", "monolith", (0,)),
        ),
        (
            Case("cold", parity.cold, 20, 20),
            Case("partly_cached", parity.partly_cached, 8),
            Case("wholly_cached", parity.wholly_cached, 6),
            Case("failed_handoff", parity.failed_handoff, 6),
        ),
    ),
    Fleet(
        SMOL,
        (
            Server("prefill", "prefill", (0,), CHUNKED),
            Server("decode", "decode", (1,)),
            Server("monolith", "monolith", (0,), CHUNKED),
        ),
        (Case("chunked_prefill", parity.cold, 8, 600),),
    ),
    Fleet(
        "tp2",
        (
            Server("prefill", "prefill", (0, 1), TP2),
            Server("decode", "decode", (1,)),
            Server("monolith", "monolith", (0,)),
        ),
        (Case("tp_2_to_1", parity.cold, 6),),
    ),
    Fleet(
        "tp2",
        (
            Server("prefill", "prefill", (0,)),
            Server("decode", "decode", (0, 1), TP2),
            # One rank: four spinning ranks on two cores would hardly move.
            Server("monolith", "monolith", (0,)),
        ),
        (Case("tp_1_to_2", parity.cold, 6),),
    ),
)


def say(line: str) -> None:
    """Print progress at once."""
    print(line, file=sys.stderr, flush=True)


def run_case(bed: Testbed, case: Case, texts: list[str]) -> Counter[str]:
    """Send every text both ways and count the verdicts."""
    verdicts: Counter[str] = Counter()
    for text in texts:
        # The monolith first: it must not see what the split has cached, nor the reverse.
        mono = complete(bed.urls["monolith"], text, max_tokens=OUTPUT_TOKENS, model=MODEL_NAME)
        split = case.send(bed, text, OUTPUT_TOKENS)
        verdict = parity.compare(split, mono)
        verdicts[verdict] += 1
        tokens = mono.usage.get("prompt_tokens")
        line = f"{case.name}: {tokens} tokens: {verdict}"
        if (position := first_difference(split, mono)) is not None:
            line += f" at {position}: {split.top[position]} / {mono.top[position]}"
        say(line)
    return verdicts


def main() -> int:
    """Run every fleet and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".run/parity"))
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--fleet", type=int, nargs="*", help="only these fleets, from 0")
    args = parser.parse_args()
    source = random.Random(args.seed)
    result: dict[str, dict[str, int]] = {}
    handoffs = 0
    chosen = range(len(FLEETS)) if args.fleet is None else args.fleet
    for number in chosen:
        fleet = FLEETS[number]
        folder = args.folder / str(number)
        (folder / "records.jsonl").unlink(missing_ok=True)
        policy = {"scheduler": {"split": {"min_prompt_tokens": 1}}}
        with Testbed(
            folder, MODELS / fleet.model, fleet.servers, flags=FLAGS, policy=policy, say=say
        ) as bed:
            for case in fleet.cases:
                # The corpus gives 0.8 to 1.15 tokens for each one asked for.
                lengths = sorted(source.randint(case.low, 1650) for _ in range(case.count))
                lengths[-1] = 1650
                texts = list(prompts(lengths, seed=source.randrange(1 << 30)))
                counts = run_case(bed, case, texts)
                result[case.name] = {
                    "prompts": case.count,
                    "identical": counts["identical"],
                    "ties": counts["tie"],
                    "different": counts["different"],
                }
        handoffs += sum(
            bool(r["handoff"]) and r["handoff"]["outcome"] == "consumed" for r in bed.records()
        )
    total = {k: sum(c[k] for c in result.values()) for k in next(iter(result.values()))}
    for name, counts in {**result, "all": total}.items():
        print(f"{name:<16}", "  ".join(f"{k} {v:>3}" for k, v in counts.items()))
    print(json.dumps({**total, "handoffs_through_gateway": handoffs, "cases": result}))
    return 1 if total["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
