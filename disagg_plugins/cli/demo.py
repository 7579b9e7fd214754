"""``disagg demo``: split a model over two workers on this machine, and compare it with one.

It writes the policies that it runs, so that what is seen can be repeated and changed by hand.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import yaml

from disagg_plugins.cli.common import positive_int, say
from disagg_plugins.cli.demo_fleet import GENERATED, MODEL, START_S, policy, refuse_unready
from disagg_plugins.errors import DisaggError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from disagg_plugins.cli.load import Sample

STOP_S = 30.0
RECORDS_S = 10.0
LOOK_S = 0.05
ANSWER_S = 120.0

PROMPT_WORDS = (150, 20, 220, 300, 380, 450)
"""One stays below the threshold of the split."""

OUTPUT_TOKENS = 32
SHARE_LOADED = 0.9
"""Least share of split prompts that decode must have taken over, not computed."""


@dataclass(slots=True)
class Answered:
    """One answer.

    Attributes:
        sample: Its times.
        text: All of it.
        ids: Its tokens, where the engine tells them.
    """

    sample: Sample
    text: str = ""
    ids: list[int] = field(default_factory=list)

    def listen(self, event: Any) -> None:
        """Take an event of the stream."""
        for choice in event.get("choices") or ():
            self.text += choice.get("text") or ""
            self.ids += choice.get("token_ids") or ()

    @property
    def said(self) -> tuple[str, tuple[int, ...]]:
        """What is compared."""
        return self.text, tuple(self.ids)


class DemoCommand:
    """Starts a prefill worker, a decode worker, one for everything, and the gateway."""

    name = "demo"
    help = "split a model over two workers here, compare with one, and write demo.json"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine and the model."""
        parser.add_argument("--engine", default="reference", help="which engine serves (reference)")
        parser.add_argument(
            "--model", default=GENERATED, help="folder of a model (a small one is generated)"
        )
        parser.add_argument(
            "--python", default=sys.executable, help="interpreter that has the engine (this one)"
        )
        parser.add_argument("--requests", type=positive_int, default=len(PROMPT_WORDS))
        parser.add_argument("--out", type=Path, default=Path("demo.json"))
        parser.add_argument(
            "--run-dir", type=Path, default=Path(".run/demo"), help="policies and logs (.run/demo)"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Run it; exit with 1 where the split did not happen or an answer differs."""
        refuse_unready(args)
        started_s = time.monotonic()
        result = run_demo(args)
        result["seconds"] = round(time.monotonic() - started_s, 2)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
        print(table(result))
        wrong = verdict(result)
        for problem in wrong:
            print(f"demo: {problem}", file=sys.stderr)
        print(f"written: {args.out}" + ("; the demo FAILED" if wrong else ""))
        return 1 if wrong else 0


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Start everything, ask both, and return what was seen.

    Raises:
        DisaggError: Something did not start.
    """
    folder = args.run_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    records = folder / "records.jsonl"
    records.unlink(missing_ok=True)
    ports = free_ports(4)
    policies = {
        "split": policy(args, ports[:2], ports[3]),
        "whole": policy(args, ports[2:3], ports[3]),
    }
    env = {**os.environ, "DISAGG_SECRET": secrets.token_hex(32)}
    ups: list[Up] = []
    with ExitStack() as stack:
        say(f"starting a prefill worker, a decode worker and one for everything ({args.engine})")
        for name, content in policies.items():
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(content, sort_keys=False))
            only = ["--workers-only"] if name == "whole" else []
            ups.append(stack.enter_context(Up(path, folder / f"{name}.log", env, only)))
        urls = [f"http://127.0.0.1:{port}" for port in (ports[3], ports[2])]
        wait_until_up([f"{urls[0]}/ready", f"{urls[1]}/health"], ups)
        say("asking both")
        split, whole = (ask(url, args.requests) for url in urls)
        found = wait_for_records(records, args.requests)
        left = open_things(urls[0])
    return {**summary(split, whole, found), "open_at_the_end": left}


class Up:
    """One ``disagg up`` as a process of its own, ended with all that it started."""

    def __init__(self, path: Path, log: Path, env: Mapping[str, str], more: Sequence[str]) -> None:
        self._command = [
            sys.executable, "-m", "disagg_plugins.cli.main", "up", str(path),
            "--run-dir", str(path.parent / path.stem), *more,
        ]  # fmt: skip
        self.log, self._env = log, env

    def __enter__(self) -> Up:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self._command, env=self._env, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)


def wait_until_up(urls: Sequence[str], ups: Sequence[Up]) -> None:
    """Wait until all answer 200.

    Raises:
        DisaggError: A process ended, or the time is over.
    """
    end_s = time.monotonic() + START_S
    waiting = list(urls)
    while waiting:
        waiting = [url for url in waiting if not answers(url)]
        for up in ups:
            if up.process.poll() is not None:
                lines = up.log.read_text(errors="replace").splitlines()[-15:]
                raise DisaggError("\n".join([f"it did not start; the end of {up.log}:", *lines]))
        if time.monotonic() > end_s:
            raise DisaggError(f"{waiting[0]} does not answer after {START_S:g} s")
        time.sleep(LOOK_S)


def answers(url: str) -> bool:
    """Return whether a GET is answered with 200."""
    try:
        with urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Return ports of loopback on which nobody listens, each once."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def ask(url: str, requests: int) -> list[Answered]:
    """Send the prompts one after the other.

    Raises:
        DisaggError: One was not answered.
    """
    from disagg_plugins.cli.load import WORDS, LoadSettings, connect, measure

    draw = random.Random(1)
    connection, path = connect(url, ANSWER_S)
    found = []
    for number in range(requests):
        words = PROMPT_WORDS[number % len(PROMPT_WORDS)]
        settings = LoadSettings(url, MODEL, 1, 1, words, OUTPUT_TOKENS, token_ids=True)
        answered = Answered(None)  # type: ignore[arg-type]  # filled in the next line
        prompt = " ".join(draw.choices(WORDS, k=words))
        answered.sample = measure(settings, connection, path, prompt, answered.listen)
        if answered.sample.error:
            raise DisaggError(f"{url} did not answer: {answered.sample.error}")
        found.append(answered)
    connection.close()
    return found


def wait_for_records(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the gateway's records once there are ``count``, or all there are in time."""
    end_s = time.monotonic() + RECORDS_S
    while True:
        lines = path.read_text().splitlines() if path.is_file() else []
        if len(lines) >= count or time.monotonic() > end_s:
            return [json.loads(line) for line in lines]
        time.sleep(LOOK_S)


def open_things(gateway: str) -> int:
    """Return the requests and handoffs that are still open at the gateway."""
    with urlopen(f"{gateway}/internal/status", timeout=10.0) as answer:
        status = json.load(answer)
    return int(status["in_flight"]) + int(status["handoffs_open"])


def summary(
    split: Sequence[Answered], whole: Sequence[Answered], records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``demo.json`` holds."""
    different = sum(a.said != b.said for a, b in zip(split, whole, strict=True))
    handoffs = [r["handoff"] for r in records if r["handoff"]]
    loaded = sum(h["tokens_loaded"] for h in handoffs)
    computed = sum(h["tokens_recomputed"] for h in handoffs)
    return {
        "tokens_equal": different == 0,
        "asked": len(split),
        "requests": len(records),
        "compared_by": "token" if all(a.ids for a in (*split, *whole)) else "text",
        "different": different,
        "split_requests": sum(r["route"] == "disaggregated" for r in records),
        "handoffs": sum(h["outcome"] == "consumed" for h in handoffs),
        "kv_bytes": sum(h["bytes"] for h in handoffs),
        "transports": sorted({h["transport"] for h in handoffs if h["transport"]}),
        "prompt_tokens_from_handoff": loaded,
        "prompt_tokens_computed_by_decode": computed,
        "tokens_from_handoff_share": loaded / (loaded + computed) if loaded + computed else 0.0,
        "problems": [h["problem"] for h in handoffs if h["problem"]],
        "split": latencies(split),
        "monolithic": latencies(whole),
    }


def latencies(answers: Sequence[Answered]) -> dict[str, float | None]:
    """Return the latencies of one arm, in seconds."""
    from disagg_plugins.cli.load import spread

    samples = [a.sample for a in answers]
    found: dict[str, float | None] = {}
    for name, values in (
        ("ttft", [s.ttft_s for s in samples if s.ttft_s is not None]),
        ("itl", [gap for s in samples for gap in s.gaps_s]),
        ("tpot", [s.tpot_s for s in samples if s.tpot_s is not None]),
    ):
        known = spread(values)
        found |= {f"{name}_p50_s": known["p50_s"], f"{name}_p99_s": known["p99_s"]}
    return found


def table(result: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"{'milliseconds':<14}{'split':>10}{'one worker':>12}"]
    for name, split in result["split"].items():
        cells = [
            f"{1000 * v:.1f}" if v is not None else "-" for v in (split, result["monolithic"][name])
        ]
        lines.append(f"{name.removesuffix('_s').replace('_', ' '):<14}{cells[0]:>10}{cells[1]:>12}")
    transports = ", ".join(result["transports"]) or "nothing"
    return "\n".join(
        [
            *lines,
            "",
            f"answers: {'equal' if result['tokens_equal'] else 'DIFFERENT'}, compared by "
            f"{result['compared_by']} ({result['requests']} requests)",
            f"handoffs: {result['handoffs']} of {result['split_requests']} split requests, "
            f"{result['kv_bytes'] / 1e6:.1f} MB of KV over {transports}",
            f"prompt tokens of split requests: {result['prompt_tokens_from_handoff']} from the "
            f"handoff, {result['prompt_tokens_computed_by_decode']} computed by decode",
            f"{result['seconds']:.1f} s in all",
        ]
    )


def verdict(result: dict[str, Any]) -> list[str]:
    """Return what is wrong; an empty list means that the split is real and right."""
    wrong = []
    if result["requests"] < result["asked"]:
        wrong.append(f"only {result['requests']} of {result['asked']} requests were recorded")
    if not result["tokens_equal"]:
        wrong.append(f"{result['different']} answers differ from those of one worker")
    if not result["split_requests"] or result["handoffs"] < result["split_requests"]:
        wrong.append(
            f"only {result['handoffs']} of {result['split_requests']} split requests handed KV "
            f"over: {result['problems'] or 'no problem was reported'}"
        )
    if result["tokens_from_handoff_share"] < SHARE_LOADED:
        wrong.append("decode computed more than a tenth of the prompts itself")
    if result["open_at_the_end"]:
        wrong.append(f"{result['open_at_the_end']} requests were still open at the end")
    return wrong
