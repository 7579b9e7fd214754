"""What prefill workers wrote of answers: the token ids, which their own answers give as text only.

The engine's loop notes what a finished prompt was and which token came first; the gateway asks for
it a moment earlier or later, from a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disagg_plugins.errors import LocalProtocolError

MOST = 256
"""Kept at once; the oldest goes first, and its request is decoded from the prompt alone."""

MAX_PROMPT_TOKENS = 100_000
"""Of a prompt whose ids are told: some 700 KiB of JSON, which the decode worker gets too."""

WAIT_S = 0.5
"""Between an engine's answer and the end of its request lie microseconds."""


@dataclass(slots=True)
class _Kept:
    handoff_id: str
    prompt: Sequence[int]
    expires_s: float
    token: int | None = None
    over: bool = False


class Openings:
    """Keeps them until they are asked for, or their tickets end; thread-safe."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return len(self._kept)

    def expect(
        self, request_id: int, handoff_id: str, prompt: Sequence[int], expires_s: float
    ) -> None:
        """Note a prompt that is read; its first token follows.

        Args:
            request_id: By which the engine knows it.
            handoff_id: Of its ticket.
            prompt: Its token ids.
            expires_s: Wall clock at which nobody can ask any more.
        """
        if len(prompt) > MAX_PROMPT_TOKENS:
            return
        with self._changed:
            self._kept[request_id] = _Kept(handoff_id, prompt, expires_s)
            if len(self._kept) > MOST:
                del self._kept[next(iter(self._kept))]

    def finished(self, request_id: int, tokens: Callable[[], Sequence[int]]) -> None:
        """Note the end of a request, whose prompt and answer ``tokens`` returns."""
        with self._changed:
            kept = self._kept.get(request_id)
            if kept is None or kept.over:
                return
            kept.over = True
            self._changed.notify_all()
            read = len(kept.prompt)
            found = tokens()
            if len(found) > read and list(found[:read]) == list(kept.prompt):
                kept.token = int(found[read])

    def take(self, request_id: int, handoff_id: str) -> tuple[list[int], int]:
        """Return a prompt and the token that was written after it; waits ``WAIT_S`` at most.

        Raises:
            LocalProtocolError: That is not known.
        """
        end_s = time.monotonic() + WAIT_S
        with self._changed:
            while True:
                kept = self._kept.get(request_id)
                if kept is None or kept.handoff_id != handoff_id:
                    raise LocalProtocolError(f"request {request_id} has no opening here")
                if kept.over:
                    break
                if not self._changed.wait(end_s - time.monotonic()):
                    del self._kept[request_id]
                    raise LocalProtocolError(
                        f"request {request_id} was not over after {WAIT_S:g} s"
                    )
            del self._kept[request_id]
        if kept.token is None:
            raise LocalProtocolError(f"the engine did not tell the tokens of request {request_id}")
        return [int(token) for token in kept.prompt], kept.token

    def sweep(self, now_s: float) -> None:
        """Forget what nobody can ask for any more, at a moment of the wall clock."""
        with self._changed:
            for request_id in [i for i, kept in self._kept.items() if kept.expires_s < now_s]:
                del self._kept[request_id]
