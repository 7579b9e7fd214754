"""The tokens of a pretend engine: each depends on the prompt and on every token before it."""

from __future__ import annotations

import zlib

VOCABULARY = 49_152
"""SmolLM2's, for ids of the usual length."""

PROMPT_MARK = 700_001
"""Ids of a prompt as it tells them: ``PROMPT_MARK`` + their number, the seed, zeros."""


def prompt_ids(seed: int, prompt_tokens: int) -> list[int]:
    """Return the ids that are told of a prompt."""
    return [PROMPT_MARK + prompt_tokens, seed, *[0] * (prompt_tokens - 2)]


def read_ids(ids: object) -> tuple[int, list[int]] | None:
    """Return the seed of a prompt that goes on with an answer, and the ids of that answer."""
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int for i in ids):
        return None
    size = ids[0] - PROMPT_MARK
    if not 2 <= size <= len(ids):
        return None
    return chained(ids[1], [i for i in ids[2:size] if i]), ids[size:]


def chained(state: int, ids: list[int]) -> int:
    """Return the state after these ids."""
    for value in ids:
        state = zlib.crc32(b"%d," % value, state)
    return state


class Tokens:
    """The tokens of one answer.

    Args:
        seed: Stands for the prompt.
        given: Ids of the answer that came with the prompt.
        odd_chars: Two of three tokens are the parts of one character, as bytes are.
    """

    def __init__(self, seed: int, given: list[int], *, odd_chars: bool = False) -> None:
        self._before = len(given)
        self._state = chained(seed, given)
        self._ids: list[int] = []
        self._odd_chars = odd_chars

    def id(self, index: int) -> int:
        """Return the id of the token that is written as number ``index``."""
        while len(self._ids) <= index:
            self._ids.append(self._state % VOCABULARY)
            self._state = chained(self._state, self._ids[-1:])
        return self._ids[index]

    def text(self, index: int) -> str:
        """Return the text that this token completes."""
        part = (self._before + index) % 3
        if not self._odd_chars or part == 0:
            return f"t{self.id(index)} "
        # the last part completes a character whose first part was held back in this answer
        return chr(0x1F300 + self.id(index) % 256) if part == 2 and index > 0 else ""
