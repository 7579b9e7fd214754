"""Reads an answer of the OpenAI API, whole or piece by piece, as far as two can be compared (pure).

What comes from a worker may be anything: a field of a wrong type is taken for missing, and no more
is kept than ``MOST_TOKENS`` and ``MOST_CHARS``. Ids that are not told for every piece have no
places, and log-probabilities that are not told for every id cannot be laid beside them: both are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from disagg_plugins.canary.answer import CHARS_PER_TOKEN, MOST_TOKENS, Answer

MOST_CHARS = CHARS_PER_TOKEN * MOST_TOKENS

MOST_ALTERNATIVES = 20
"""Of one token, as OpenAI bounds ``top_logprobs``; what engines tell beyond is not looked at."""

MOST_NAME_CHARS = 256
"""Of a token's name: the longest tokens of vocabularies are runs of 128 spaces."""

MOST_VALUE = 1 << 53
"""Of a log-probability that is written as an integer; JSON has some that no float can hold."""

MAX_TOKEN_ID = (1 << 32) - 1


class AnswerReader:
    """One answer with one choice, while it comes."""

    __slots__ = ("_full", "_gaps", "_ids", "_text", "_text_chars", "_tokens", "_top", "_untold")

    def __init__(self) -> None:
        self._text: list[str] = []
        self._text_chars = 0
        self._ids: list[int] = []
        self._tokens: list[str] = []
        self._top: list[Mapping[str, float]] = []
        self._full = self._untold = self._gaps = False

    def add(self, choice: Mapping[str, object]) -> None:
        """Take a choice: of a whole answer, or of one event of a stream."""
        if self._full:
            return
        wrote = self._add_text(choice)
        told = choice.get("logprobs")
        before = len(self._tokens)
        if isinstance(told, Mapping):
            self._add_completion(told)
            self._add_chat(told)
        ids = choice.get("token_ids")
        if isinstance(ids, list) and ids:
            self._ids += ids
            known = all(type(i) is int and 0 <= i <= MAX_TOKEN_ID for i in ids)
            self._gaps = self._gaps or not known
            if len(self._tokens) - before != len(ids):
                self._untold = True
        elif wrote:
            self._gaps = True  # text of tokens that were not named
        if max(len(self._ids), len(self._tokens)) > MOST_TOKENS or self._text_chars > MOST_CHARS:
            self._full = True

    def answer(self, *, ended: bool) -> Answer:
        """Return what is known; ``ended``: the answer came to its end, with no error."""
        names = not self._untold and len(self._tokens) == len(self._top)
        ids = () if self._gaps else tuple(self._ids[:MOST_TOKENS])
        if ids and len(self._ids) != len(self._tokens):
            names = False
        return Answer(
            "".join(self._text)[:MOST_CHARS],
            ids,
            tuple(self._tokens[:MOST_TOKENS]) if names else (),
            tuple(self._top[:MOST_TOKENS]) if names else (),
            cut=self._full or not ended,
        )

    def _add_text(self, choice: Mapping[str, object]) -> bool:
        text = choice.get("text")
        for key in ("delta", "message"):
            message = choice.get(key)
            if isinstance(message, Mapping):
                text = message.get("content")
        if isinstance(text, str):
            self._text.append(text[: MOST_CHARS + 1])
            self._text_chars += len(text)
        return isinstance(text, str) and bool(text)

    def _add_completion(self, told: Mapping[str, object]) -> None:
        """Take the log-probabilities of completions: lists beside each other."""
        names, values, top = (told.get(k) for k in ("tokens", "token_logprobs", "top_logprobs"))
        if not isinstance(names, list):
            return
        for place, name in enumerate(names[: MOST_TOKENS + 1]):
            found = _named(top[place]) if isinstance(top, list) and place < len(top) else {}
            value = values[place] if isinstance(values, list) and place < len(values) else None
            self._add_token(name, value, found)

    def _add_chat(self, told: Mapping[str, object]) -> None:
        """Take those of chat completions: one object a token."""
        content = told.get("content")
        for item in content[: MOST_TOKENS + 1] if isinstance(content, list) else ():
            if not isinstance(item, Mapping):
                self._untold = True
                continue
            found: dict[str, float] = {}
            others = item.get("top_logprobs")
            for other in others[:MOST_ALTERNATIVES] if isinstance(others, list) else ():
                if isinstance(other, Mapping):
                    found.update(_one(other.get("token"), other.get("logprob")))
            self._add_token(item.get("token"), item.get("logprob"), found)

    def _add_token(self, name: object, value: object, top: dict[str, float]) -> None:
        if not isinstance(name, str) or len(name) > MOST_NAME_CHARS:
            self._untold = True
            return
        top.update(_one(name, value))
        self._tokens.append(name)
        self._top.append(top)


def _named(told: object) -> dict[str, float]:
    """Return the log-probabilities that are some, by the tokens' names."""
    if not isinstance(told, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, value in list(told.items())[:MOST_ALTERNATIVES]:
        found.update(_one(name, value))
    return found


def _one(name: object, value: object) -> dict[str, float]:
    if not isinstance(name, str) or len(name) > MOST_NAME_CHARS:
        return {}
    if isinstance(value, float) or (type(value) is int and abs(value) <= MOST_VALUE):
        return {name: float(value)}
    return {}
