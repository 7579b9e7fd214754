"""What long prompts do to a running answer: a split against a monolith on the same two cores.

``make bench NAME=interference``. One answer is written steadily while prompts of 1,500 tokens keep
arriving, one after the other. The split has a prefill worker on one core and a decode worker on the
other; the monolith has both cores and is tried with token budgets of 128 to 2048 (vLLM's default
on a CPU). *Best-tuned* is the monolith with the lowest ITL p99 whose long prompts are not slower
than the split's; where none is, the one with the fastest long prompts. Ratios are monolith over
split, so above 1 the split is better. The last line is one JSON object. Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disagg_plugins.cli.load import spread
from tests.corpus import prompts
from tests.engines.client import complete
from tests.engines.testbed import MODEL_NAME, Server, Testbed

BUDGETS = (128, 256, 512, 1024, 2048)
DEFAULT_BUDGET = 2048
LONG_TOKENS = 1500
STEADY_TOKENS = 300
FLAGS = ("--enforce-eager", "--max-model-len", "2048")


@dataclass(frozen=True, slots=True)
class Row:
    """What one arm did, times in seconds."""

    name: str
    itl_p50_s: float
    itl_p99_s: float
    itl_max_s: float
    itl_std_s: float
    decode_tokens_per_s: float
    long_ttft_p50_s: float
    long_ttft_max_s: float
    gaps: int


def say(line: str) -> None:
    """Print progress at once."""
    print(line, file=sys.stderr, flush=True)


class SteadyAnswer:
    """Writes answers one after the other from a thread, until told to stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.arrivals_s: list[list[float]] = []
        self.problem: Exception | None = None

    def __enter__(self) -> SteadyAnswer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                answer = complete(
                    self._url,
                    "Write a long story.",
                    max_tokens=STEADY_TOKENS,
                    model=MODEL_NAME,
                    logprobs=None,
                )
                self.arrivals_s.append(answer.arrivals_s)
        except Exception as exc:
            self.problem = exc

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Return the gaps between chunks that ended within the window."""
        return [
            b - a
            for answer in self.arrivals_s
            for a, b in zip(answer, answer[1:], strict=False)
            if start_s <= b <= end_s
        ]


def measure(name: str, url: str, count: int, seed: int) -> Row:
    """Send ``count`` long prompts beside one steady answer."""
    texts = list(prompts([1800] * (count + 1), seed=seed))
    long: list[Any] = []
    complete(url, texts.pop()[:3000], max_tokens=2, model=MODEL_NAME, logprobs=None)
    with SteadyAnswer(url) as steady:
        complete(url, "One.", max_tokens=16, model=MODEL_NAME, logprobs=None)
        for text in texts:
            long.append(complete(url, cut(text), max_tokens=1, model=MODEL_NAME, logprobs=None))
    if steady.problem is not None:
        raise steady.problem
    start_s, end_s = long[0].started_s, long[-1].arrivals_s[-1]
    gaps = steady.gaps_s(start_s, end_s)
    itl, ttft = spread(gaps), spread([a.ttft_s for a in long])
    row = Row(
        name,
        itl["p50_s"] or 0.0,
        itl["p99_s"] or 0.0,
        max(gaps),
        itl["std_s"] or 0.0,
        len(gaps) / (end_s - start_s),
        ttft["p50_s"] or 0.0,
        max(a.ttft_s for a in long),
        len(gaps),
    )
    say(show(row))
    return row


_TOKENIZER: list[Any] = []


def cut(text: str) -> str | list[int]:
    """Return the first 1,500 tokens of a text as token ids."""
    ids = _TOKENIZER[0].encode(text * 2)
    return list(ids[:LONG_TOKENS])


def show(row: Row) -> str:
    """Return one line of the table."""
    return (
        f"{row.name:<14} ITL ms: p50 {1000 * row.itl_p50_s:7.1f}  p99 {1000 * row.itl_p99_s:7.1f}  "
        f"std {1000 * row.itl_std_s:6.1f}  {row.decode_tokens_per_s:5.1f} tok/s   "
        f"long prompt s: p50 {row.long_ttft_p50_s:5.2f}  max {row.long_ttft_max_s:5.2f}"
    )


def best_tuned(split: Row, monoliths: list[Row]) -> Row:
    """Return the monolith to beat; see the head of this file."""
    fast = [m for m in monoliths if m.long_ttft_p50_s <= split.long_ttft_p50_s]
    if fast:
        return min(fast, key=lambda m: m.itl_p99_s)
    return min(monoliths, key=lambda m: m.long_ttft_p50_s)


def ratios(split: Row, monolith: Row, suffix: str) -> dict[str, float]:
    """Return monolith over split."""
    return {
        f"itl_p99_ratio{suffix}": monolith.itl_p99_s / split.itl_p99_s,
        f"itl_std_ratio{suffix}": monolith.itl_std_s / split.itl_std_s,
        f"ttft_ratio{suffix}": monolith.long_ttft_p50_s / split.long_ttft_p50_s,
    }


def main() -> int:
    """Run both arms and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--folder", type=Path, default=Path(".run/interference"))
    parser.add_argument("--long-prompts", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=BUDGETS, help="must hold the default budget"
    )
    args = parser.parse_args()
    from transformers import AutoTokenizer

    _TOKENIZER.append(AutoTokenizer.from_pretrained(args.model))
    flags = (*FLAGS, "--dtype", args.dtype)
    split_servers = [Server("prefill", "prefill", (0,)), Server("decode", "decode", (1,))]
    with Testbed(args.folder / "split", args.model, split_servers, flags=flags, say=say) as bed:
        split = measure("split", bed.gateway_url, args.long_prompts, 1)
    records = [r for r in bed.records() if r["prompt_tokens"] == LONG_TOKENS]
    loaded = [r for r in records if r["split"] == "yes"]
    monoliths = []
    for batch in (args.budgets[:3], args.budgets[3:]):
        if not batch:
            continue
        servers = [
            Server(f"m{b}", "monolith", (0, 1), ("--max-num-batched-tokens", str(b))) for b in batch
        ]
        folder = args.folder / f"m{batch[0]}"
        with Testbed(folder, args.model, servers, flags=flags, gateway=False, say=say) as bed:
            for i, budget in enumerate(batch):
                url = bed.urls[f"m{budget}"]
                monoliths.append(measure(f"monolith {budget}", url, args.long_prompts, 2 + i))
    best = best_tuned(split, monoliths)
    default = next(m for m in monoliths if m.name.endswith(str(DEFAULT_BUDGET)))
    print("\n".join(show(row) for row in (split, *monoliths)))
    print(f"best-tuned: {best.name}; handoffs of long prompts: {len(loaded)} of {len(records)}")
    result = {
        **ratios(split, best, ""),
        **ratios(split, default, "_default"),
        "best_tuned": best.name,
        "dtype": args.dtype,
        "long_prompts_handed_over": len(loaded),
        "rows": [asdict(row) for row in (split, *monoliths)],
    }
    print(json.dumps(result))
    return 0 if len(loaded) == len(records) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
