"""Between text and tokens: the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.chat_template import load_chat_template

HALF = "\ufffd"
"""What an incomplete character is decoded to."""

MOST_HELD_TOKENS = 8
"""A character of UTF-8 has four bytes, and a token at least one: longer is no character to come."""


class Text:
    """A model's tokenizer.

    Raises:
        ConfigError: There is none in the folder.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises plain Exception
            raise ConfigError(f"is no tokenizer: {exc}", file=str(path)) from exc
        self._render = load_chat_template(folder)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a completion's prompt, special tokens added as the model wants them.

        Raises:
            ValueError: Half a surrogate pair is in it, which JSON can carry and UTF-8 cannot.
        """
        return self._encode(text, special=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise ValueError(f"no text: half a surrogate pair at character {exc.start}") from exc
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def chat(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """Return the ids of a chat.

        Raises:
            ValueError: The model has no chat template, or it refuses the messages.
        """
        if self._render is None:
            raise ValueError("this model has no chat template: send a completion request")
        try:
            text = self._render({"messages": messages, "add_generation_prompt": True})
        except Exception as exc:  # whatever the template raises
            raise ValueError(f"the chat template refuses these messages: {exc}") from exc
        return self._encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, token: int) -> str:
        """Return one token as text, for log-probabilities."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text


class Pieces:
    """Turns tokens into pieces of text, and ends the answer at a stop.

    A character that is not complete is held back, and so is what may be the beginning of a stop.
    """

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._text, self._stops = text, tuple(stops)
        self._ids: list[int] = []
        self._from = 0  # tokens before are told, but give those behind their context
        self._seen = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return what can be told now."""
        self._ids.append(token)
        before = self._text.decode(self._ids[self._from : self._seen])
        now = self._text.decode(self._ids[self._from :])
        pending = len(self._ids) - self._seen
        if now.endswith(HALF) and pending < MOST_HELD_TOKENS:
            return ""
        self._from, self._seen = self._seen, len(self._ids)
        return self._after_stops(now[len(before) :])

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        if self.stopped:
            return ""
        before = self._text.decode(self._ids[self._from : self._seen])
        now = self._text.decode(self._ids[self._from :])
        self._seen = len(self._ids)
        piece = self._after_stops(now[len(before) :])
        held, self._held = self._held, ""  # empty where a stop was found
        return piece + held

    def _after_stops(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of ``text`` may begin ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
