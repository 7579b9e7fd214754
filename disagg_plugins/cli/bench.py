"""``disagg bench URL``: load an OpenAI endpoint a little and print its latencies."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_plugins.cli.common import positive_float, positive_int

if TYPE_CHECKING:
    import argparse

API_KEY_VARIABLE = "OPENAI_API_KEY"

ROWS = (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2e"))
COLUMNS = (("mean", "mean_s"), ("p50", "p50_s"), ("p99", "p99_s"), ("std", "std_s"))


def table(result: dict[str, Any]) -> str:
    """Return the latencies of ``summarise`` as a table in milliseconds."""
    lines = ["        " + "".join(f"{name:>10}" for name, _ in COLUMNS) + "   (ms)"]
    for title, key in ROWS:
        values = [result[key][column] for _, column in COLUMNS]
        cells = "".join(f"{v * 1000:>10.1f}" if v is not None else f"{'-':>10}" for v in values)
        lines.append(f"{title:<8}{cells}")
    return "\n".join(lines)


class BenchCommand:
    """Sends streaming requests in a closed loop; the last line it prints is JSON."""

    name = "bench"
    help = "load an OpenAI endpoint and print TTFT, ITL and TPOT"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add what to send and where."""
        parser.add_argument("url", help="http://host:port of a gateway, or of any engine")
        parser.add_argument("--model", help="the model to ask for (default: the first one listed)")
        parser.add_argument("--requests", type=positive_int, default=32)
        parser.add_argument("--concurrency", type=positive_int, default=4)
        parser.add_argument(
            "--prompt-tokens", type=positive_int, default=512, help="about so many a prompt"
        )
        parser.add_argument("--output-tokens", type=positive_int, default=64)
        parser.add_argument("--chat", action="store_true", help="use chat completions")
        parser.add_argument(
            "--timeout-s", type=positive_float, default=120.0, help="longest silence"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
        parser.add_argument("--output", type=Path, help="write the JSON to this file too")

    def run(self, args: argparse.Namespace) -> int:
        """Measure and print; exit with 1 if a request failed."""
        from disagg_plugins.cli.load import LoadSettings, first_model, run_load, summarise

        api_key = os.environ.get(API_KEY_VARIABLE, "")
        settings = LoadSettings(
            url=args.url,
            model=args.model or first_model(args.url, args.timeout_s, api_key),
            requests=args.requests,
            concurrency=args.concurrency,
            prompt_words=args.prompt_tokens,
            output_tokens=args.output_tokens,
            chat=args.chat,
            timeout_s=args.timeout_s,
            seed=args.seed,
            api_key=api_key,
        )

        def progress(done: int) -> None:
            if sys.stderr.isatty() or done == args.requests:
                end = "\n" if done == args.requests else "\r"
                print(f"{done} of {args.requests} requests", end=end, file=sys.stderr, flush=True)

        samples, wall_s = run_load(settings, progress)
        result = {"url": args.url, "model": settings.model, **summarise(samples, wall_s)}
        print(table(result))
        print(
            f"{result['requests']} requests, {result['failed']} failed, {wall_s:.1f} s, "
            f"{result['output_tokens_per_s']:.1f} output tokens/s"
        )
        for error in result["errors"]:
            print(f"failed: {error}")
        text = json.dumps(result)
        if args.output:
            args.output.write_text(text + "\n")
        print(text)
        return 1 if result["failed"] else 0
