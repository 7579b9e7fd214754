"""Who asks what when: workloads of the policy benchmark, from a seed or a public trace (pure).

Times are virtual seconds: those of the pretend engines, not of the clock.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import log
from pathlib import Path

from disagg_plugins.testing.pace import CHARS_PER_TOKEN

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count, in seconds."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when, its prompt, and how many tokens it wants."""

    at_s: float
    prompt: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of traffic.

    Attributes:
        name: As it is printed.
        slo: What counts.
        rates: Requests per virtual second of the whole fleet, one level each.
        prefills: How many of four workers a split fleet gives to prefill: what an operator who
            knows this traffic would choose.
        asks: Makes the requests of a level: seed, rate, seconds.
        about: What it is, in words.
    """

    name: str
    slo: Slo
    rates: tuple[float, ...]
    prefills: int
    asks: Callable[[int, float, float], list[Ask]]
    about: str


def words(key: str, tokens: int) -> str:
    """Return a text of so many pretend tokens that is the same for the same key."""
    piece = f"{key} the quick brown fox jumps over the lazy dog. "
    chars = tokens * CHARS_PER_TOKEN
    return (piece * (chars // len(piece) + 1))[:chars]


def _lognormal(source: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    return max(least, min(most, round(source.lognormvariate(log(median), sigma))))


def _arrivals(source: random.Random, rate: float, seconds: float) -> Iterator[float]:
    """Yield Poisson arrivals; another rate has the same requests, nearer to each other."""
    at_s = 0.0
    while (at_s := at_s + source.expovariate(1.0) / rate) < seconds:
        yield at_s


def chat(seed: int, rate: float, seconds: float) -> list[Ask]:
    """Return turns of conversations: one of 12 system prompts, then what is the user's own."""
    source = random.Random(f"chat {seed}")
    return [
        Ask(
            at_s,
            words(f"system {source.randrange(12)}", 400)
            + words(f"user {seed} {number}", _lognormal(source, 180, 0.9, 16, 1500)),
            _lognormal(source, 160, 0.7, 8, 500),
        )
        for number, at_s in enumerate(_arrivals(source, rate, seconds))
    ]


def summarise(seed: int, rate: float, seconds: float) -> list[Ask]:
    """Return long documents with answers of a paragraph or two."""
    source = random.Random(f"summarise {seed}")
    return [
        Ask(
            at_s,
            words(f"document {seed} {number}", _lognormal(source, 3000, 0.5, 1000, 9000)),
            _lognormal(source, 200, 0.4, 50, 500),
        )
        for number, at_s in enumerate(_arrivals(source, rate, seconds))
    ]


def code(seed: int, rate: float, seconds: float) -> list[Ask]:
    """Return completions in 40 open files: what is before the cursor is long and shared."""
    source = random.Random(f"code {seed}")
    return [
        Ask(
            at_s,
            words(f"file {source.randrange(40)}", source.randrange(200, 1200))
            + words(f"cursor {seed} {number}", source.randrange(50, 400)),
            _lognormal(source, 14, 0.6, 2, 60),
        )
        for number, at_s in enumerate(_arrivals(source, rate, seconds))
    ]


def _thinned(
    rows: list[tuple[float, str, int]], seed: int, rate: float, seconds: float
) -> list[Ask]:
    """Return a stretch of a trace, its times scaled to ``rate``; the order and the bursts stay."""
    count = min(len(rows), round(rate * seconds))
    start = random.Random(f"trace {seed}").randrange(max(1, len(rows) // 2))
    start = min(start, len(rows) - count)
    part = rows[start : start + count]
    begin_s, span_s = part[0][0], max(part[-1][0] - part[0][0], 1e-9)
    return [Ask((at_s - begin_s) / span_s * seconds, text, n) for at_s, text, n in part]


def azure(path: Path) -> Callable[[int, float, float], list[Ask]]:
    """Return requests of an Azure LLM inference trace (2023); it tells lengths, no prefixes."""
    rows = []
    with path.open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            tokens, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            rows.append((at_s, number, max(2, tokens), max(1, output)))
    rows.sort()

    def asks(seed: int, rate: float, seconds: float) -> list[Ask]:
        made = [(at_s, f"azure {n} {tokens}", output) for at_s, n, tokens, output in rows]
        return [
            Ask(a.at_s, words(a.prompt, int(a.prompt.split()[2])), a.output_tokens)
            for a in _thinned(made, seed, rate, seconds)
        ]

    return asks


def mooncake(path: Path, most_tokens: int) -> Callable[[int, float, float], list[Ask]]:
    """Return requests of a Mooncake trace, whose ``hash_ids`` tell which blocks are shared.

    Prompts over ``most_tokens`` are left out: they do not fit the engine that is modelled.
    """
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["input_length"] <= most_tokens:
            ids = " ".join(map(str, row["hash_ids"]))
            rows.append(
                (row["timestamp"] / 1000, f"{row['input_length']} {ids}", row["output_length"])
            )

    def asks(seed: int, rate: float, seconds: float) -> list[Ask]:
        found = []
        for ask in _thinned(rows, seed, rate, seconds):
            length, *ids = ask.prompt.split()
            text = "".join(words(f"block {i}", MOONCAKE_BLOCK_TOKENS) for i in ids)
            prompt = text[: int(length) * CHARS_PER_TOKEN]
            found.append(Ask(ask.at_s, prompt, max(1, ask.output_tokens)))
        return found

    return asks


def workloads(anchors: Path) -> list[Workload]:
    """Return every workload; those of traces only where their files are.

    Bounds are those of the field, for an engine whose step takes 20 ms: chat as in DistServe's
    example (0.4 s, 0.04 s), code and conversation with a quick start and readable flow, documents
    with a late start but a flow at most 1.5 times that of an idle engine, Splitwise's bound.
    """
    found = [
        Workload(
            "chat",
            Slo(0.4, 0.04),
            (8.0, 12.0, 16.0),
            1,
            chat,
            "400 shared and about 180 own prompt tokens, about 160 of answer",
        ),
        Workload(
            "summarise",
            Slo(4.0, 0.03),
            (1.0, 1.6, 2.2),
            1,
            summarise,
            "documents of about 3,000 tokens, about 200 of answer",
        ),
        Workload(
            "code",
            Slo(0.3, 0.1),
            (14.0, 24.0, 36.0),
            3,
            code,
            "about 900 prompt tokens, most of them shared, about 14 of answer",
        ),
    ]
    path = anchors / "AzureLLMInferenceTrace_conv.csv"
    if path.is_file():
        found.append(
            Workload(
                "azure-conv",
                Slo(1.0, 0.05),
                (3.0, 6.0, 9.0),
                2,
                azure(path),
                "a stretch of the Azure conversation trace of 2023, bursts as they came",
            )
        )
    path = anchors / "mooncake_conversation_trace.jsonl"
    if path.is_file():
        found.append(
            Workload(
                "mooncake",
                Slo(6.0, 0.06),
                (0.4, 0.8, 1.4),
                2,
                mooncake(path, 24_000),
                "a stretch of the Mooncake conversation trace, prompts up to 24,000 tokens",
            )
        )
    return found
