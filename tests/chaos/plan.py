"""What is asked and what goes wrong, from a seed alone (pure)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MODEL = "fake-model"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

PROMPT_WORDS = (3, 40, 200, 600, 1500)
"""Words of a prompt: under and over the 256 tokens from which requests are split."""

ABORTED_SHARE = 0.04
"""Clients that reset their connection, before the answer or in it."""

KEPT_SHARE = 0.5
"""Requests that go out on a connection kept from an earlier one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        name: Its request id.
        at_s: When it is sent.
        path: The endpoint.
        body: The JSON body.
        stream: Whether a stream is asked for.
        kept: Whether a kept connection may carry it.
        abort_after: Reads of the answer after which the client resets; None: it stays.
    """

    name: str
    at_s: float
    path: str
    body: bytes
    stream: bool
    kept: bool
    abort_after: int | None = None


def asks(seed: int, count: int, seconds: float) -> list[Ask]:
    """Return requests with Poisson arrivals; no two have the same prompt."""
    source = random.Random(f"asks {seed}")
    at_s, found = 0.0, []
    for number in range(count):
        at_s += source.expovariate(count / seconds)
        prompt = f"{seed}/{number} " + _words(source, source.choice(PROMPT_WORDS))
        chat, stream = source.random() < 0.5, source.random() < 0.7
        said: dict[str, object] = (
            {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        )
        tokens = source.choice((1, 2, 8, 30, 90))
        body = {"model": MODEL, **said, "max_tokens": tokens, "temperature": 0, "stream": stream}
        found.append(
            Ask(
                name=f"c{seed}-{number}",
                at_s=at_s,
                path=CHAT if chat else COMPLETIONS,
                body=json.dumps(body).encode(),
                stream=stream,
                kept=source.random() < KEPT_SHARE,
                abort_after=source.choice((0, 1, 3)) if source.random() < ABORTED_SHARE else None,
            )
        )
    return found


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(("alpha", "beta", "gamma", "delta")) for _ in range(count))


Kind = Literal["kill", "stop", "behave", "reset", "cut", "slow", "gateway_kill", "gateway_end"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        at_s: When it begins.
        kind: ``kill`` (SIGKILL, started again on the same port), ``stop`` (SIGSTOP for a while),
            ``behave`` (a few wrong answers), ``reset`` (RST on every open connection), ``cut``
            (RST in the midst of an answer), ``slow`` (bytes are held up), and the end of a gateway
            by SIGKILL or SIGTERM.
        target: The worker's or gateway's name.
        for_s: How long it lasts.
        value: Of ``behave``: which behaviour. Of ``cut``: after so many bytes. Of ``slow``: the
            delay in milliseconds.
    """

    at_s: float
    kind: Kind
    target: str
    for_s: float = 0.0
    value: int = 0


BEHAVIOURS: tuple[dict[str, object], ...] = (
    {"status": 500},
    {"status": 503},
    {"status": 429},
    {"close": "head"},
    {"close": "stream", "after_chunks": 2},
    {"hang": "head"},
    {"hang": "stream", "after_chunks": 2},
    {"garbage": "http"},
    {"garbage": "body"},
    {"no_params": True},
    {"error_event": 500},
    {"no_done": True},
    {"close_delimited": True},
)
"""What a worker that misbehaves does, in the words of ``fake_engine.Behaviour``."""

MIN_FAULT_S, MAX_STOP_S = 0.2, 4.0
PROXIED_KINDS: tuple[Kind, ...] = ("reset", "cut", "slow")
ANY_KINDS: tuple[Kind, ...] = ("kill", "stop", "behave")


def faults(
    seed: int, workers: Sequence[str], proxied: Sequence[str], seconds: float, gap_s: float
) -> list[Fault]:
    """Return what happens to the workers; each has at most one fault at a time.

    Args:
        seed: Makes the schedule.
        workers: Their names.
        proxied: Those with a proxy before them.
        seconds: No fault begins later, and few last longer.
        gap_s: Mean time between two.
    """
    source = random.Random(f"faults {seed}")
    until_s = dict.fromkeys(workers, 0.0)
    at_s, found = 0.0, []
    while (at_s := at_s + source.expovariate(1 / gap_s)) < seconds:
        target = source.choice(list(workers))
        kind = source.choice(ANY_KINDS + (PROXIED_KINDS if target in proxied else ()))
        for_s = source.uniform(MIN_FAULT_S, MAX_STOP_S if kind in ("stop", "slow") else 1.5)
        value = {
            "behave": source.randrange(len(BEHAVIOURS)),
            "cut": source.randrange(1, 4000),
            "slow": source.randrange(5, 300),
        }.get(kind, 0)
        if at_s < until_s[target]:
            continue
        for_s = min(for_s, max(MIN_FAULT_S, seconds - at_s))
        until_s[target] = at_s + for_s
        found.append(Fault(at_s, kind, target, for_s, value))
    return found


def gateway_faults(names: Sequence[str], seconds: float) -> list[Fault]:
    """Return the ends of every gateway but the first: one by SIGKILL, one by SIGTERM."""
    found = []
    for name in names[1:]:
        found.append(Fault(seconds / 3, "gateway_kill", name, 0.5))
        found.append(Fault(2 * seconds / 3, "gateway_end", name, 0.5))
    return found
