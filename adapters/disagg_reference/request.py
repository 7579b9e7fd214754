"""One request as the engine knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: Least share of the probability that is drawn from.
        top_k: Most tokens that are drawn from; 0: any.
        seed: Of the draws; None: another one each time.
        logprobs: Log-probabilities of so many of the best tokens are told; None: of none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What the engine says of a request, in order; the last one has a ``finish_reason``.

    Attributes:
        token: The next token; None: there is none.
        finish_reason: Why it is over, or None: it goes on.
        problem: What went wrong, with ``error``.
        logprob: Log-probability of the token, where they were asked for.
        best: Log-probabilities of the best tokens, where they were asked for.
    """

    token: int | None = None
    finish_reason: FinishReason | None = None
    problem: str = ""
    logprob: float | None = None
    best: Mapping[int, float] = field(default_factory=dict)


class State(StrEnum):
    """Where a request is."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    OVER = "over"


@dataclass(slots=True, eq=False)
class Request:
    """One request; the engine's loop alone writes to it.

    Attributes:
        request_id: Unique for the life of the engine; up to 63 bits.
        prompt: Token ids, at least one.
        max_tokens: Longest answer.
        sampling: How tokens are chosen.
        eos: Tokens that end the answer.
        min_tokens: Tokens before which none of ``eos`` is chosen.
        params: What the client said of the handoff, for whoever moves KV.
        tell: Called with every output, on the engine's thread.
        state: Where it is.
        output: Tokens so far.
        local_tokens: Prompt tokens found in the engine's own cache.
        matched_tokens: Prompt tokens that whoever moves KV brings, behind ``local_tokens``. A host
            that loads asynchronously may lower it before it says that it is done.
        computed_tokens: Tokens whose KV is in the pool.
        blocks: Its blocks in order.
        promised_blocks: Blocks that it may still take.
        told: What whoever moved KV answers to the client, beside the text.
    """

    request_id: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos: frozenset[int] = frozenset()
    min_tokens: int = 0
    params: Mapping[str, object] = field(default_factory=dict)
    tell: Callable[[Output], None] = lambda output: None
    state: State = State.WAITING
    output: list[int] = field(default_factory=list)
    local_tokens: int = 0
    matched_tokens: int = 0
    computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    promised_blocks: int = 0
    told: Mapping[str, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens whose KV may have to be kept: that of the last token never is."""
        return len(self.prompt) + self.max_tokens - 1

    def tokens(self, first: int, end: int) -> list[int]:
        """Return the tokens ``[first, end)`` of prompt and answer."""
        length = len(self.prompt)
        if end <= length:
            return list(self.prompt[first:end])
        return [*self.prompt[first:], *self.output[max(0, first - length) : end - length]]
