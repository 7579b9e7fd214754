"""``disagg top``: the fleet live in the terminal, from the gateway's own status."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from disagg_plugins.cli.common import (
    add_arm,
    add_gateway,
    gateway_url,
    no_such_arm,
    of_arm,
    positive_float,
    say,
)
from disagg_plugins.cli.environment import get_json
from disagg_plugins.telemetry.split_words import beside_happened

if TYPE_CHECKING:
    import argparse

Status = Mapping[str, Any]

CLEAR = "\x1b[H\x1b[J"
"""To the upper left, then clear to the end: ECMA-48 CUP and ED, known to every terminal."""


@dataclass(frozen=True, slots=True)
class Look:
    """One status and when it was taken, in seconds of one clock."""

    status: Status
    at_s: float


class TopCommand:
    """Shows workers, queues, rates, KV room, handoffs and failures, again and again."""

    name = "top"
    help = "show the fleet live: roles, queues, tokens a second, KV room, handoffs, failures"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add where the gateway is and how often to look."""
        add_gateway(parser)
        add_arm(parser)
        parser.add_argument(
            "--every", type=positive_float, default=1.0, metavar="S", help="seconds between looks"
        )
        parser.add_argument("--once", action="store_true", help="print one look and end")

    def run(self, args: argparse.Namespace) -> int:
        """Look until interrupted; 1 when the gateway does not answer the first time."""
        before: Look | None = None
        gateway = gateway_url(args)
        try:
            while True:
                now = _look(gateway, args.arm)
                if isinstance(now, str):
                    if before is None or args.once:
                        say(now)
                        return 1
                    _show([f"{now}; asking again every {args.every:g} s"])
                else:
                    _show(list(table(now, before)))
                    before = now
                if args.once:
                    return 0
                time.sleep(args.every)
        except KeyboardInterrupt:
            return 0


def _look(gateway: str, arm: str) -> Look | str:
    try:
        code, answer = get_json(gateway, of_arm("/internal/status", arm))
    except (OSError, HTTPException, ValueError) as problem:
        return f"{gateway} does not answer: {problem}; start it, or give --policy or --gateway"
    if code == 403:
        return f"{gateway} tells its state to its own host only: run this command there"
    if code != 200 or not isinstance(answer, dict) or "workers" not in answer:
        return f"{gateway}/internal/status answered {code}: is it a gateway?"
    if (absent := no_such_arm(answer, arm)) is not None:
        return f"{gateway}: {absent}"
    return Look(answer, time.monotonic())


def _show(lines: list[str]) -> None:
    start = CLEAR if sys.stdout.isatty() else ""
    print(start + "\n".join(lines), flush=True)


COLUMNS = "{:<16} {:<8} {:<7} {:<9} {:>9} {:>9} {:>8} {:>8} {:>8} {:>7} {:>6}"


def table(now: Look, before: Look | None = None) -> Iterator[str]:
    """Yield the lines of one look; rates need the look before.

    Tokens count when their request ends, so rates of long answers come in jumps.
    """
    status = now.status
    split = status.get("split") or {}
    requests = _sum(status, "requests")
    rate = "" if before is None else f"{_rate(now, before, 'requests'):.1f}/s, "
    yield (
        f"{status.get('model') or 'no model yet'}   {status['in_flight']} in flight   "
        f"{rate}{requests:g} requests in all   {status['handoffs_open']} handoffs open"
        + ("   DRAINING" if status.get("draining") else "")
    )
    yield (
        f"split: {split.get('happened', 0)} of {split.get('routed_disaggregated', 0)} happened"
        + f"{beside_happened(split)} ({split.get('recent_requests', 0)} last requests)   handoffs: "
        + (", ".join(f"{k} {v:g}" for k, v in (status.get("handoffs") or {}).items()) or "none")
    )
    yield ""
    yield COLUMNS.format(
        "WORKER", "ENGINE", "ROLE", "STATE", "REQUESTS", "TO READ", "READ/s", "WRITE/s", "KV",
        "SERVED", "FAILED",
    )  # fmt: skip
    earlier = {} if before is None else {w["name"]: w for w in before.status["workers"]}
    for worker in status["workers"]:
        yield _row(worker, earlier.get(worker["name"]), now, before)
    yield from _troubles(status)


def _row(worker: Status, earlier: Status | None, now: Look, before: Look | None) -> str:
    rates = ["-", "-"]
    if earlier is not None and before is not None:
        span_s = max(1e-3, now.at_s - before.at_s)
        keys = ("tokens_read", "tokens_written")
        # a worker that was replaced under its name begins at 0 again
        rates = [f"{max(0, worker[key] - earlier[key]) / span_s:.0f}" for key in keys]
    return COLUMNS.format(
        worker["name"][:16],
        worker["engine"][:8],
        worker["role"],
        _state(worker),
        f"{worker['requests']}/{worker['capacity']}",
        worker["prompt_tokens"],
        *rates,
        _kv(worker),
        worker["served"],
        sum((worker.get("failed") or {}).values()),
    )


def _state(worker: Status) -> str:
    if worker.get("draining"):
        return "draining"
    if not worker["healthy"]:
        return "SLOW" if worker.get("slow") else "OUT"
    return "trial" if worker.get("trial") else "ok"


def _kv(worker: Status) -> str:
    if worker.get("kv_usage") is not None:
        return f"{worker['kv_usage']:.0%}"
    room = worker.get("kv_room_tokens")
    if room:
        return f"{worker['kv_tokens'] / room:.0%}"
    return f"{worker['kv_tokens']} t"


def _troubles(status: Status) -> Iterator[str]:
    out = [w for w in status["workers"] if not w["healthy"]]
    problems = [f"{w['name']}: {w['reason']}" for w in out]
    problems += [f"no split: {p}" for p in status.get("split_problems") or ()]
    problems += [f"plugin {p} failed {n:g} times" for p, n in status["plugin_failures"].items()]
    if problems:
        yield ""
    yield from problems


def _sum(status: Status, key: str) -> float:
    return float(sum((status.get(key) or {}).values()))


def _rate(now: Look, before: Look, key: str) -> float:
    span_s = max(1e-3, now.at_s - before.at_s)
    return max(0.0, _sum(now.status, key) - _sum(before.status, key)) / span_s
