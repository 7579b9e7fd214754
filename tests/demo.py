"""Split a real model over two real workers and compare it with one engine on the same cores.

``make demo`` runs it, ``make demo ENGINE=sglang`` and ``make demo ENGINE=mixed`` do the same with
SGLang, and with a prompt read by vLLM and answered by SGLang. It starts a prefill worker, a decode
worker, the decode worker's engine without the connector and the gateway, sends the same prompts to
both arms one after the other, prints a table and writes ``demo.json``. The exit code is not zero
when the split did not happen or an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from disagg_plugins.cli.load import spread
from disagg_plugins.errors import DisaggError
from tests.corpus import prompts
from tests.engines.client import Completion, complete, first_difference, is_tie
from tests.engines.testbed import MODEL_NAME, Engine, Server, Testbed

LENGTHS_TOKENS = (60, 350, 500, 700, 900, 1100, 1300, 1500)
"""One prompt stays below the split's threshold; the rest are split."""

OUTPUT_TOKENS = 32
TIE_GAP = 1e-4
"""Two best tokens closer than this in log-probability are a tie: float32 rounds that much when the
number of threads differs."""

RECORD_WAIT_S = 10.0
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
SGLANG_FLAGS = ("--context-length", "2048", "--dtype", "float32")

ENGINES: dict[str, tuple[Engine, Engine]] = {
    "vllm": ("vllm", "vllm"),
    "sglang": ("sglang", "sglang"),
    "mixed": ("vllm", "sglang"),
}
"""The engines of prefill and decode."""


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, file=sys.stderr, flush=True)


def arm(answers: Sequence[Completion]) -> dict[str, float | None]:
    """Return the latencies of one arm, in seconds."""
    ttft = spread([a.ttft_s for a in answers])
    itl = spread([gap for a in answers for gap in a.itls_s])
    tpot = spread([a.tpot_s for a in answers if a.tpot_s is not None])
    return {
        "ttft_p50_s": ttft["p50_s"],
        "ttft_p99_s": ttft["p99_s"],
        "itl_p50_s": itl["p50_s"],
        "itl_p99_s": itl["p99_s"],
        "itl_std_s": itl["std_s"],
        "tpot_p50_s": tpot["p50_s"],
        "tpot_p99_s": tpot["p99_s"],
        "tpot_std_s": tpot["std_s"],
    }


def wait_for_records(bed: Testbed, count: int) -> list[dict[str, Any]]:
    """Return the gateway's records once ``count`` are written."""
    deadline_s = time.monotonic() + RECORD_WAIT_S
    while len(records := bed.records()) < count and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return records[-count:]


def compare(split: Sequence[Completion], mono: Sequence[Completion]) -> tuple[int, int]:
    """Return how many answers differ at a tie of the two best tokens, and how many truly."""
    ties = different = 0
    for a, b in zip(split, mono, strict=True):
        position = first_difference(a, b)
        if position is not None:
            if a.top and is_tie(a, b, position, gap=TIE_GAP):
                ties += 1
            else:
                different += 1
                say(
                    f"different at token {position}: {a.tokens[position:][:3]} against "
                    f"{b.tokens[position:][:3]}"
                )
    return ties, different


def summary(
    split: list[Completion], mono: list[Completion], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``demo.json`` holds."""
    ties, different = compare(split, mono)
    handoffs = [r["handoff"] for r in records if r["handoff"]]
    loaded = sum(h["tokens_loaded"] for h in handoffs)
    computed = sum(h["tokens_recomputed"] for h in handoffs)
    return {
        "tokens_equal": different == 0,
        "requests": len(records),
        "ties": ties,
        "different": different,
        "split_requests": sum(r["route"] == "disaggregated" for r in records),
        "handoffs": sum(h["outcome"] == "consumed" for h in handoffs),
        "kv_bytes": sum(h["bytes"] for h in handoffs),
        "transports": sorted({h["transport"] for h in handoffs if h["transport"]}),
        "prompt_tokens_from_handoff": loaded,
        "prompt_tokens_computed_by_decode": computed,
        "tokens_from_handoff_share": loaded / (loaded + computed) if loaded + computed else 0.0,
        "problems": [h["problem"] for h in handoffs if h["problem"]],
        "split": arm(split),
        "monolithic": arm(mono),
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"{'milliseconds':<14}{'split':>10}{'monolithic':>12}"]
    for name in result["split"]:
        a, b = result["split"][name], result["monolithic"][name]
        label = name.removesuffix("_s").replace("_", " ")
        lines.append(f"{label:<14}{1000 * a:>10.1f}{1000 * b:>12.1f}")
    share = 100 * result["tokens_from_handoff_share"]
    transports = ", ".join(result["transports"]) or "nothing"
    lines += [
        "",
        f"answers: {'equal' if result['tokens_equal'] else 'DIFFERENT'}"
        f" ({result['requests']} requests, {result['ties']} ended at a tie)",
        f"handoffs: {result['handoffs']} of {result['split_requests']} split requests, "
        f"{result['kv_bytes'] / 1e6:.1f} MB of KV over {transports}",
        f"prompt tokens of split requests: {result['prompt_tokens_from_handoff']} from the "
        f"handoff, {result['prompt_tokens_computed_by_decode']} computed by decode "
        f"({share:.1f} % taken over)",
    ]
    return "\n".join(lines)


def verdict(result: dict[str, Any]) -> list[str]:
    """Return what is wrong; an empty list means that the split is real and right."""
    wrong = []
    if not result["tokens_equal"]:
        wrong.append(f"{result['different']} answers differ from the monolith's")
    if result["split_requests"] == 0 or result["handoffs"] < result["split_requests"]:
        wrong.append(
            f"only {result['handoffs']} of {result['split_requests']} split requests handed KV "
            f"over: {result['problems'] or 'no problem was reported'}"
        )
    if result["tokens_from_handoff_share"] < 0.9:
        wrong.append("decode computed more than a tenth of the prompts itself")
    return wrong


def run(model: Path, folder: Path, engine: str) -> dict[str, Any]:
    """Start everything, send the prompts, return the result."""
    prefill, decode = ENGINES[engine]
    # Across engines the first token comes without log-probabilities, so ties cannot be told.
    logprobs = 2 if prefill == decode else None
    servers = [
        Server("prefill", "prefill", (0,), engine=prefill),
        Server("decode", "decode", (1,), engine=decode),
        Server("monolith", "monolith", (0, 1), engine=decode),
    ]
    texts = list(prompts(list(LENGTHS_TOKENS), seed=1))
    flags = {"flags": FLAGS, "sglang_flags": SGLANG_FLAGS}
    with Testbed(folder, model, servers, **flags, say=say) as bed:
        arms = (bed.gateway_url, bed.urls["monolith"])
        say("warming up")
        for url in arms:
            for text in prompts([40, 400], seed=99):
                complete(url, text, max_tokens=4, model=MODEL_NAME, logprobs=logprobs)
        warm = len(wait_for_records(bed, 2))
        answers: list[list[Completion]] = [[], []]
        for i, text in enumerate(texts):
            for url, list_ in zip(arms, answers, strict=True):
                list_.append(
                    complete(
                        url, text, max_tokens=OUTPUT_TOKENS, model=MODEL_NAME, logprobs=logprobs
                    )
                )
            tokens = answers[0][-1].usage.get("prompt_tokens")
            say(f"prompt {i + 1} of {len(texts)}: {tokens} tokens, answered by both arms")
        records = wait_for_records(bed, warm + len(texts))[warm:]
        return summary(*answers, records)


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, default=Path("demo.json"))
    parser.add_argument("--folder", type=Path, default=Path(".run/demo"), help="logs and records")
    parser.add_argument("--engine", choices=list(ENGINES), default="vllm")
    args = parser.parse_args()
    records = args.folder / "records.jsonl"
    records.unlink(missing_ok=True)
    try:
        result = run(args.model, args.folder, args.engine)
    except DisaggError as error:
        say(f"demo: {error}")
        return 1
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    wrong = verdict(result)
    for problem in wrong:
        print(f"demo: {problem}", file=sys.stderr)
    print(f"written: {args.out}" if not wrong else f"written: {args.out}; the demo FAILED")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
