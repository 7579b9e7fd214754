"""From logits to tokens: greedy, or drawn with a seed of the request's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from disagg_reference.request import Sampling

MAX_SEED = 1 << 63

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM: logits divided by them leave float32's range."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token.

    Attributes:
        token: Its id.
        logprob: Its log-probability before temperature and cuts; None: not asked for.
        best: The best tokens and theirs, as many as were asked for.
    """

    token: int
    logprob: float | None
    best: dict[int, float]


class Sampler:
    """Chooses the tokens of one request.

    Draws depend on the seed and on how many were made: a batch around the request changes nothing.
    """

    def __init__(self, how: Sampling) -> None:
        self._how = how
        self._generator: torch.Generator | None = None
        if how.temperature >= GREEDY_BELOW:
            self._generator = torch.Generator()
            if how.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(how.seed % MAX_SEED)

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Return the next token.

        Args:
            logits: float32, shape ``(vocab_size,)``.
        """
        token = int(logits.argmax()) if self._generator is None else self._draw(logits)
        if self._how.logprobs is None:
            return Chosen(token, None, {})
        logs = logits.log_softmax(-1)
        values, ids = logs.topk(min(self._how.logprobs, len(logs)))
        best = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logs[token]), best)

    def _draw(self, logits: torch.Tensor) -> int:
        scaled = logits.cpu() / self._how.temperature
        values, ids = scaled.sort(descending=True, stable=True)
        if 0 < self._how.top_k < len(values):
            values, ids = values[: self._how.top_k], ids[: self._how.top_k]
        shares = values.softmax(-1)
        if self._how.top_p < 1.0:
            before = shares.cumsum(-1) - shares
            shares = shares * (before < self._how.top_p)
        return int(ids[torch.multinomial(shares, 1, generator=self._generator)])
