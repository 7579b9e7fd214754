"""A whole answer as the client wants it: in one piece, or as the events of a stream (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body

JSON_LINE = b"content-type: application/json\r\n"
EVENTS_LINE = b"content-type: text/event-stream\r\n"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode


def as_asked(answer: Body, *, stream: bool, usage: bool) -> tuple[bytes, bytes]:
    """Return the body of an answer and the line that names its type.

    Args:
        answer: Of a request that was not streamed.
        stream: Whether the client asked for a stream.
        usage: Whether it wants the usage at the end of it.
    """
    if not stream:
        return _encode(answer), JSON_LINE
    choices = answer.get("choices")
    events = [
        {
            **{k: v for k, v in answer.items() if k not in ("choices", "usage", "object")},
            "object": _kind(answer),
            "choices": [_piece(each) for each in choices if isinstance(each, Mapping)]
            if isinstance(choices, list)
            else [],
        }
    ]
    if usage and answer.get("usage") is not None:
        events.append({**events[0], "choices": [], "usage": answer["usage"]})
    return b"".join(b"data: %b\n\n" % _encode(event) for event in events) + DONE, EVENTS_LINE


def _kind(answer: Body) -> object:
    kind = answer.get("object")
    return "chat.completion.chunk" if kind == "chat.completion" else kind


def _piece(choice: Mapping[str, object]) -> dict[str, object]:
    """Return a choice as the only event of a stream has it."""
    found = {k: v for k, v in choice.items() if k != "message"}
    if "message" in choice:
        found["delta"] = choice["message"]
    return found
