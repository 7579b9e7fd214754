"""An answer that prefill began and decode went on with, put together for the client (sans-IO).

The decode worker takes the first token for a part of its prompt. So its answer lacks that token's
text, and counts it on the wrong side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.trail import read_event

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, Opening

USAGE = b'"usage"'

_encode = msgspec.json.encode


class Opened:
    """Puts one completion together.

    Args:
        opening: What prefill wrote.
    """

    __slots__ = ("_begun", "_opening")

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._begun = False

    def stream(self, data: bytes) -> bytes:
        """Return events of the decode worker's stream as the client gets them."""
        if self._begun and USAGE not in data:
            return data
        return b"\n\n".join([self._event(event) if event else event for event in _split(data)])

    def misread(self, data: bytes) -> str | None:
        """Return how events of the stream say that decode read another prompt, or None."""
        if USAGE not in data:
            return None
        for event in _split(data):
            try:
                usage = (_read(event) or {}).get("usage")
                if isinstance(usage, dict) and type(usage.get("prompt_tokens")) is int:
                    self._check(usage)
            except RemoteProtocolError as exc:
                return str(exc)
        return None

    def _event(self, event: bytes) -> bytes:
        plain = _read(event)
        if plain is None:
            silent = self._begun or _data(event) is None
            return event if silent else self._unopened(event)
        if plain.get("error"):
            self._begun = True
            return event
        changed = False
        usage = plain.get("usage")
        if isinstance(usage, dict):
            plain["usage"] = _recounted(usage)
            changed = True
        choices = plain.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if self._begun or not isinstance(choice, dict):
            return _rewritten(event, plain) if changed else event
        self._begun = True
        first = {**choice, "text": self._opening.text, "finish_reason": None}
        if "stop_reason" in first:
            first["stop_reason"] = None
        kept = {k: v for k, v in plain.items() if k not in ("choices", "usage")}
        rest = _rewritten(event, plain) if changed else event
        return b"data: %b\n\n%b" % (_encode({**kept, "choices": [first]}), rest)

    def _unopened(self, event: bytes) -> bytes:
        """Return an event that ends the answer or cannot be read, after what prefill wrote."""
        self._begun = True
        choice = {"index": 0, "text": self._opening.text, "logprobs": None, "finish_reason": None}
        first = {"object": "text_completion", "choices": [choice]}
        return b"data: %b\n\n%b" % (_encode(first), event)

    def whole(self, answer: bytes) -> bytes:
        """Return the decode worker's whole answer as the client gets it.

        Raises:
            RemoteProtocolError: It is not an answer to what was asked.
        """
        try:
            plain = msgspec.json.decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RemoteProtocolError(f"the answer is not JSON: {exc}") from exc
        choices = plain.get("choices") if isinstance(plain, dict) else None
        choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
        text = choice.get("text") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(text, str):
            raise RemoteProtocolError("the answer has not exactly one choice with a text")
        usage = plain.get("usage")
        if isinstance(usage, dict):
            self._check(usage)
            plain["usage"] = _recounted(usage)
        plain["choices"] = [{**choice, "text": self._opening.text + text}]
        return _encode(plain)

    def _check(self, usage: Mapping[str, object]) -> None:
        read, given = usage.get("prompt_tokens"), len(self._opening.prompt) + 1
        if read != given:
            raise RemoteProtocolError(
                f"the decode worker read {read!r:.40} tokens, not the {given} that it was given"
            )

    def counts(self, prompt: int | None, output: int | None) -> tuple[int | None, int | None]:
        """Return tokens of prompt and answer by what the decode worker said of its own."""
        return (
            prompt if prompt is None else prompt - 1,
            output if output is None else output + 1,
        )


def _split(data: bytes) -> list[bytes]:
    return data.replace(b"\r\n", b"\n").split(b"\n\n")


def _data(event: bytes) -> bytes | None:
    """Return what an event carries, which may have comments and other fields beside; or None."""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _read(event: bytes) -> Body | None:
    """Return the JSON object of an event, or None where it carries none."""
    data = _data(event)
    return None if data is None else read_event(b"data:" + data)


def _rewritten(event: bytes, plain: Body) -> bytes:
    """Return an event that carries something else."""
    beside = [line for line in event.split(b"\n") if not line.startswith(b"data:")]
    return b"\n".join([*beside, b"data: " + _encode(plain)])


def _recounted(usage: Body) -> Body:
    found = dict(usage)
    for key, more in (("prompt_tokens", -1), ("completion_tokens", 1)):
        value = found.get(key)
        if type(value) is int:
            found[key] = value + more
    return found
