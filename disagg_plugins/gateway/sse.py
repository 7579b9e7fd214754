"""A cheap observer of a stream of server-sent events (sans-IO).

Bytes go in, the bytes that may be forwarded come out: whole events only, so that a stream that
breaks never leaves half an event with the client. Nothing is re-serialised; JSON is parsed once,
at the end, and only the last few reads of the stream.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

MAX_HELD_BYTES = 1 << 20
"""An event longer than this is forwarded in pieces (the longest seen in practice, with 20
log-probabilities for 100 bundled tokens, stay below 200 KiB)."""

DONE = b"data: [DONE]"

OUTPUT = b'"choices":[{'
OUTPUT_SPACED = b'"choices": [{'
"""What an event that carries output holds. Inside a JSON text the quotes would be escaped; the
usage event has an empty list."""

_decode = msgspec.json.Decoder().decode


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """What the last events of a stream said.

    Attributes:
        finish: The last ``finish_reason``, or None.
        prompt_tokens: From ``usage``, or None.
        output_tokens: From ``usage``, or None.
        error: The message of an error event, or None.
    """

    finish: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


class SseObserver:
    """Watches one stream."""

    __slots__ = ("done", "keep", "part", "recent")

    def __init__(self) -> None:
        self.part = b""  # an unfinished event that is held back
        self.done = False
        self.recent: deque[bytes] = deque(maxlen=3)
        self.keep = self.recent.append  # notes whole events that are forwarded without ``feed``

    def feed(self, data: bytes) -> bytes:
        """Take received bytes; return what may be forwarded now, perhaps nothing."""
        if self.part:
            data = self.part + data
            self.part = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            end = _last_boundary(data)
            if len(data) - end <= MAX_HELD_BYTES:
                self.part = data[end:]
                data = data[:end]
                if not data:
                    return data
        self.keep(data)
        if not self.done and DONE in data[-32:]:
            self.done = True
        return data

    @property
    def ended(self) -> bool:
        """Whether the end mark was forwarded."""
        return self.done or (bool(self.recent) and DONE in self.recent[-1][-32:])

    def all_said(self, *, single: bool) -> bool:
        """Return whether nothing of the answer is missing but usage and framing.

        Clients leave at the end mark, or at the finish reason of their ``single`` choice.
        """
        return not self.held and (self.ended or (single and self.end().finish is not None))

    @property
    def held(self) -> bool:
        """Whether part of an event is being held back."""
        return bool(self.part)

    def rest(self) -> bytes:
        """Return what is still held (an unfinished event) and forget it."""
        rest, self.part = self.part, b""
        return rest

    def end(self) -> StreamEnd:
        """Read finish reason, usage and errors from the last events."""
        text = b"".join(self.recent)
        finish: str | None = None
        prompt = output = None
        error: str | None = None
        for line in reversed(text.splitlines()):
            if not line.startswith(b"data:") or line.startswith(DONE):
                continue
            said = read_answer(line[5:])
            prompt = said.prompt_tokens if prompt is None else prompt
            output = said.output_tokens if output is None else output
            error = error or said.error
            finish = said.finish
            if finish is not None:  # an error event may follow it
                break
        return StreamEnd(finish, prompt, output, error)


def carries_output(data: bytes) -> bool:
    """Return whether some event in ``data`` carries output: usage and the end mark do not."""
    return OUTPUT in data or OUTPUT_SPACED in data


def failed_at_once(data: bytes) -> str | None:
    """Return the message of a stream that begins with the worker's failure, or None.

    An engine that has answered 200 can tell only in an event that it failed. An error of the
    client's (its code is 4xx) is no failure.
    """
    if carries_output(data) or b'"error"' not in data:
        return None
    for line in data.splitlines():
        if line.startswith(b"data:"):
            error = _error_field(line[5:])
            code = error.get("code") if isinstance(error, dict) else None
            if isinstance(code, int) and 400 <= code < 500:
                return None
            return _error(error)
    return None


def _error_field(data: bytes) -> object:
    try:
        event = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return event.get("error") if isinstance(event, dict) else None


def _last_boundary(data: bytes) -> int:
    """Return where the last whole event ends; 0 when there is none."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)


def read_answer(data: bytes) -> StreamEnd:
    """Read finish reason, usage and error of one JSON answer or event; never raises."""
    try:
        event = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return StreamEnd()
    if not isinstance(event, dict):
        return StreamEnd()
    return StreamEnd(_finish(event), *_usage(event.get("usage")), _error(event.get("error")))


def _finish(event: dict[str, object]) -> str | None:
    choices = event.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    reason = first.get("finish_reason") if isinstance(first, dict) else None
    return reason if isinstance(reason, str) else None


def _usage(usage: object) -> tuple[int | None, int | None]:
    if not isinstance(usage, dict):
        return None, None
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (
        prompt if isinstance(prompt, int) else None,
        output if isinstance(output, int) else None,
    )


def _error(error: object) -> str | None:
    if error is None:
        return None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:300]
