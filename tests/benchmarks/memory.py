"""Does a worker's memory grow? A thousand handoffs between two real vLLM workers.

``make bench NAME=memory``. A small model (four layers), so that the time goes into handoffs. The
last line is one JSON object: resident memory of each worker's processes after a warm-up and at the
end, in MiB, with descriptors and threads. Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.engines.client import complete
from tests.engines.testbed import MODEL_NAME, Server, Testbed

FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
PROMPT_TOKENS = 300
WARM_UP = 150
"""Handoffs before the first weighing, so that allocators and pools have their size."""


def say(line: str) -> None:
    """Print progress at once."""
    print(line, file=sys.stderr, flush=True)


def weigh(bed: Testbed) -> dict[str, dict[str, int]]:
    """Return memory in MiB, descriptors and threads of each worker's processes and the gateway."""
    trees = {name: bed.processes(name) for name in ("prefill", "decode")}
    trees["gateway"] = [bed.gateway_process()]
    return {
        name: {
            "rss_mib": sum(p.memory_info().rss for p in tree) >> 20,
            "fds": sum(p.num_fds() for p in tree),
            "threads": sum(p.num_threads() for p in tree),
        }
        for name, tree in trees.items()
    }


def main() -> int:
    """Run the handoffs and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/tiny"))
    parser.add_argument("--folder", type=Path, default=Path(".run/memory"))
    parser.add_argument("--handoffs", type=int, default=1000)
    args = parser.parse_args()
    (args.folder / "records.jsonl").unlink(missing_ok=True)
    source = random.Random(4)
    servers = [Server("prefill", "prefill", (0,)), Server("decode", "decode", (1,))]
    policy = {"scheduler": {"split": {"min_prompt_tokens": 64}}}
    with Testbed(args.folder, args.model, servers, flags=FLAGS, policy=policy, say=say) as bed:
        points = {}
        for i in range(WARM_UP + args.handoffs):
            if i in (WARM_UP, WARM_UP + args.handoffs // 2):
                points[str(i - WARM_UP)] = weigh(bed)
            prompt = [source.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]
            complete(bed.gateway_url, prompt, max_tokens=2, model=MODEL_NAME, logprobs=None)
            if i % 100 == 0:
                say(f"{i} handoffs")
        points[str(args.handoffs)] = weigh(bed)
    consumed = sum(r["split"] == "yes" for r in bed.records())
    growth = {
        name: points[str(args.handoffs)][name]["rss_mib"] - points["0"][name]["rss_mib"]
        for name in points["0"]
    }
    for count, weights in points.items():
        print(count, weights)
    print(json.dumps({"handoffs": consumed, "growth_mib": growth, "points": points}))
    return 0 if consumed >= args.handoffs else 1


if __name__ == "__main__":
    sys.exit(main())
