"""Reads an answer while it passes on its way to its client (sans-IO).

Nothing is held but what ``AnswerReader`` keeps and the beginning of an event whose end has not come
yet; both are bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.canary.answer_reader import AnswerReader

if TYPE_CHECKING:
    from disagg_plugins.canary.answer import Answer

MOST_PENDING_BYTES = 1 << 20
"""Of an event, or of a whole answer in pieces, that is not complete; a longer one is not read."""

_decode = msgspec.json.Decoder().decode


class Tap:
    """One answer of one choice."""

    __slots__ = ("_complete", "_lost", "_pending", "_reader", "_stream")

    def __init__(self) -> None:
        self._reader = AnswerReader()
        self._pending = b""
        self._stream = self._lost = self._complete = False

    def whole(self, status: int, body: bytes) -> None:
        """An answer in one piece."""
        if status == 200 and len(body) <= MOST_PENDING_BYTES:
            self._add(body)
            self._complete = True

    def start(self, status: int, lines: bytes, first: bytes) -> None:
        """The head, and the first bytes."""
        self._stream = b"text/event-stream" in lines
        self._lost = status != 200
        self.write(first)

    def write(self, data: bytes) -> None:
        """More bytes."""
        if self._lost or not data:
            return
        pending = self._pending + data
        if self._stream:
            events = pending.replace(b"\r\n", b"\n").split(b"\n\n")
            pending = events.pop()
            for event in events:
                self._event(event)
        if len(pending) > MOST_PENDING_BYTES:
            self._lost, pending = True, b""
        self._pending = pending

    def complete(self, last: bytes = b"") -> None:
        """The last bytes; the answer came to its end."""
        self.write(last)
        if self._lost:
            return
        if not self._stream:
            self._add(self._pending)
        self._pending, self._complete = b"", True

    def answer(self) -> Answer | None:
        """Return what was read; None where the answer did not come to its end, or was no answer."""
        return self._reader.answer(ended=True) if self._complete else None

    def _event(self, event: bytes) -> None:
        for line in event.split(b"\n"):
            data = line[5:].strip() if line.startswith(b"data:") else b""
            if data and data != b"[DONE]":
                self._add(data)

    def _add(self, data: bytes) -> None:
        try:
            found = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._lost = True
            return
        if not isinstance(found, Mapping):
            return
        choices = found.get("choices")
        for choice in choices[:1] if isinstance(choices, list) else ():
            if isinstance(choice, Mapping):
                self._reader.add(choice)
