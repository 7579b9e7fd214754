"""A real model decodes greedily: twice in sound health, and with damage in one KV head (torch).

Prompts are read whole, or in chunks of a random length as a scheduler would have it: in bfloat16
these round differently, which is the noise that parity is measured against. The damage is what a
handoff could do: it lies in the KV of the prompt, behind ``FIRST_DAMAGED``, of one KV head of one
layer. As in an engine, the last token of the prompt is computed where the answer is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_plugins.canary.answer import Answer

if TYPE_CHECKING:
    import torch

FIRST_DAMAGED = 512
ROWS = 8
"""Prompts that are decoded at once, all of one length."""

Damage = Callable[["torch.Tensor"], "torch.Tensor"]
"""Of one head, shape (rows, tokens, head_dim): keys or values behind ``FIRST_DAMAGED``."""


def zero(part: torch.Tensor) -> torch.Tensor:
    """Lose it: what a block that never came looks like."""
    return part * 0


def double(part: torch.Tensor) -> torch.Tensor:
    """Scale it: what a wrong scale of a quantised cache does."""
    return part * 2


def foreign(part: torch.Tensor) -> torch.Tensor:
    """Take it from another request: what a wrong entry of a block table does."""
    return part.roll(1, 0)


DAMAGES: dict[str, Damage] = {"zero": zero, "double": double, "foreign": foreign}


class Decoder:
    """A model that answers prompts in ways that differ as arms do.

    Args:
        folder: Of the model.
        layer: Where damage is done.
        head: Which KV head of that layer.
        output_tokens: Of each answer.
    """

    def __init__(self, folder: Path, layer: int, head: int, output_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.layer, self.head, self.output_tokens = layer, head, output_tokens

    def read(self, ids: torch.Tensor, chunk: int) -> Any:
        """Return the KV of all but the last token of prompts, read ``chunk`` tokens at a time."""
        from transformers import DynamicCache

        cache = DynamicCache()
        with self.torch.inference_mode():
            for start in range(0, ids.shape[1] - 1, chunk):
                piece = ids[:, start : min(start + chunk, ids.shape[1] - 1)]
                self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def copied(self, cache: Any, damage: Damage | None = None) -> Any:
        """Return a copy of KV, with the damage done."""
        from transformers import DynamicCache

        copy = DynamicCache()
        for number, layer in enumerate(cache.layers):
            keys, values = layer.keys.clone(), layer.values.clone()
            if damage is not None and number == self.layer:
                for part in (keys, values):
                    behind = part[:, self.head, FIRST_DAMAGED:]
                    part[:, self.head, FIRST_DAMAGED:] = damage(behind.clone())
            copy.update(keys, values, number)
        return copy

    def write(self, cache: Any, last: torch.Tensor) -> list[Answer]:
        """Return the greedy answers behind KV and the last token of each prompt."""
        torch, steps = self.torch, []
        token = last
        with torch.inference_mode():
            for _ in range(self.output_tokens):
                logits = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
                best = logits.float().log_softmax(-1).topk(4)
                token = best.indices[:, :1]
                steps.append((best.indices.tolist(), best.values.tolist()))
        answers = []
        for row in range(last.shape[0]):
            top = [
                {str(t): v for t, v in zip(ids[row], values[row], strict=True)}
                for ids, values in steps
            ]
            written = [ids[row][0] for ids, _ in steps]
            answers.append(Answer("", written, [str(t) for t in written], top, cut=True))
        return answers

    def answers(self, texts: list[str], tokens: int, seed: int) -> Iterator[dict[str, Answer]]:
        """Yield the answers to each prompt, cut to so many tokens, by how they came about.

        ``original`` and ``again`` are the baseline's, ``candidate`` that of a sound candidate;
        the others are its answers with the damage of that name, where the prompt is long enough.
        """
        source = random.Random(seed)
        damages = DAMAGES if tokens > FIRST_DAMAGED + 1 else {}
        for start in range(0, len(texts), ROWS):
            rows = [self.tokenizer(t).input_ids[:tokens] for t in texts[start : start + ROWS]]
            ids = self.torch.tensor([row for row in rows if len(row) == tokens])
            last = ids[:, -1:]
            found = {"original": self.write(self.read(ids, tokens), last)}
            found["again"] = self.write(self.read(ids, source.randint(64, 256)), last)
            kv = self.read(ids, source.randint(64, 256))
            found["candidate"] = self.write(self.copied(kv), last)
            for name, damage in damages.items():
                found[name] = self.write(self.copied(kv, damage), last)
            for row in range(ids.shape[0]):
                yield {name: answers[row] for name, answers in found.items()}
