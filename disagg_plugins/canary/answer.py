"""Two answers to one greedy request: where they part, whether at a tie, how far they drift (pure).

Engines do not round alike from batch to batch, so answers of one and the same deployment part now
and then: where two tokens are nearly as good, and the later the answer the likelier. Whether it
happens more often than that is for ``parity`` to say; here two answers are compared.

- ``identical``: all that is known of both.
- ``tie``: they part where both sides held both tokens for nearly as good. Needs log-probabilities.
- ``different``: they part otherwise. So do answers of which one ends where the other goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Likeness = Literal["identical", "tie", "different"]

CHARS_PER_TOKEN = 4
"""Where only texts are known, positions are about tokens all the same: four characters a token is
what English has with the usual vocabularies."""

MOST_TOKENS = 4096
"""Of an answer that are kept; no divergence that tells anything begins later."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as far as it is known.

    Args:
        text: All of it; of a chat the content.
        ids: Of its tokens; empty where the engine did not tell.
        tokens: As the engine names them in log-probabilities; empty without those.
        top: For each of these the best alternatives and itself: token -> log-probability.
        cut: Only the beginning is known: nothing is said of where it ends.
    """

    text: str = ""
    ids: Sequence[int] = ()
    tokens: Sequence[str] = ()
    top: Sequence[Mapping[str, float]] = ()
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """How two answers relate.

    Attributes:
        position: Tokens before they part; None: they do not.
        gap: How far apart the two tokens are there, in log-probability, where they are furthest;
            None: nobody knows.
        drift: Mean difference of the log-probabilities that both sides gave to the same tokens
            behind the same beginning; None without any.
        compared_by: What was compared.
    """

    likeness: Likeness
    position: int | None
    gap: float | None
    drift: float | None
    compared_by: Literal["ids", "tokens", "text"]


def compare(one: Answer, other: Answer, *, tie_gap: float) -> Difference:
    """Return how two answers to the same request relate.

    Args:
        one: One side; the order is nothing to the result.
        other: The other side.
        tie_gap: Tokens no further apart, in log-probability, are a tie.
    """
    position: int | None
    if one.ids and other.ids:
        position, by = _parting(one.ids, other.ids, one.cut, other.cut), "ids"
    elif one.tokens and other.tokens and _names_alike(one.tokens, other.tokens):
        position, by = _parting(one.tokens, other.tokens, one.cut, other.cut), "tokens"
    else:
        position = _parting(one.text, other.text, one.cut, other.cut)
        return Difference(
            "identical" if position is None else "different",
            None if position is None else position // CHARS_PER_TOKEN,
            None,
            None,
            "text",
        )
    common = len(one.tokens) if position is None else position + 1
    drift = _drift(one, other, common)
    gap = None if position is None else _gap(one, other, position)
    likeness: Likeness = "different"
    if position is None:
        likeness = "identical"
    elif gap is not None and gap <= tie_gap:
        likeness = "tie"
    return Difference(likeness, position, gap, drift, "ids" if by == "ids" else "tokens")


def _parting(one: Sequence[object], other: Sequence[object], *cuts: bool) -> int | None:
    """Return how much both have in common, or None where nothing shows that they part."""
    for position, (ours, theirs) in enumerate(zip(one, other, strict=False)):
        if ours != theirs:
            return position
    shorter = min(len(one), len(other))
    for known, cut in zip((one, other), cuts, strict=True):
        if cut and len(known) == shorter:
            return None
    return None if len(one) == len(other) else shorter


def _names_alike(one: Sequence[str], other: Sequence[str]) -> bool:
    # vLLM can be asked to write token_id:N, which no other engine does
    return one[0].startswith("token_id:") == other[0].startswith("token_id:")


def _drift(one: Answer, other: Answer, common: int) -> float | None:
    """Return the drift over the first ``common`` positions, all behind the same beginning.

    Over all tokens that both sides name, unlikely ones too: with a head zeroed in half of a prompt
    of 1,024 tokens, SmolLM2's drift over four tokens a position was above that of a sound pair 93
    times of 100; over the written token alone, or as a divergence weighted by probability, 84 and
    90 times.
    """
    total, count = 0.0, 0
    for _, ours, theirs in zip(range(common), one.top, other.top, strict=False):
        for token in ours.keys() & theirs.keys():
            distance = abs(ours[token] - theirs[token])
            if math.isfinite(distance):
                total += distance
                count += 1
    return total / count if count else None


def _gap(one: Answer, other: Answer, position: int) -> float | None:
    if position >= min(len(one.tokens), len(other.tokens), len(one.top), len(other.top)):
        return None
    names = one.tokens[position], other.tokens[position]
    gaps = []
    for top in (one.top[position], other.top[position]):
        ours, theirs = top.get(names[0]), top.get(names[1])
        if ours is None or theirs is None:
            return None
        gaps.append(abs(ours - theirs))
    return max(gaps)


def not_comparable(body: Mapping[str, object], *, seeds: bool = False) -> str | None:
    """Return why two answers to a request may differ in any case, or None.

    Args:
        body: The request, of OpenAI's completions or chat completions.
        seeds: Whether a seed makes both arms draw alike: only where both run the same engine.
    """
    for key in ("n", "best_of"):
        if body.get(key) not in (None, 1):
            return f"{key} > 1"
    if body.get("use_beam_search"):
        return "beam search"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return "a batch of prompts"
    temperature = body.get("temperature")
    greedy = type(temperature) in (int, float) and temperature == 0
    # without a temperature engines take 1, or what the model's generation_config says
    if greedy or body.get("top_k") == 1 or (seeds and type(body.get("seed")) is int):
        return None
    return "it is sampled"
