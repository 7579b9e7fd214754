"""Which requests belong to one conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg_plugins.gateway.wire import header_value

if TYPE_CHECKING:
    from disagg_plugins.gateway.body import Body
    from disagg_plugins.gateway.wire import Header

MAX_SESSION_CHARS = 256
"""Identifiers are at most a few UUIDs; of a longer one the beginning counts."""


def session_of(headers: Sequence[Header], body: Body) -> str | None:
    """Return the session of a request, or None.

    It is the header ``x-disagg-session``, else OpenAI's ``prompt_cache_key``, else its ``user``.
    """
    said = header_value(headers, b"x-disagg-session")
    if said:
        return said[:MAX_SESSION_CHARS].decode("latin-1")
    for key in ("prompt_cache_key", "user"):
        value: object = body.get(key)
        if isinstance(value, str) and value:
            return value[:MAX_SESSION_CHARS]
    return None
