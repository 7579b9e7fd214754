"""The hot path of streams: one chunk of whole events from a worker to a client."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from disagg_plugins.gateway.sse import OUTPUT, OUTPUT_SPACED
from disagg_plugins.gateway.trail import IDS, unframed

if TYPE_CHECKING:
    from disagg_plugins.gateway.sse import SseObserver
    from disagg_plugins.gateway.trail import Trail

Take = Callable[[bytes], None]

LEAD = len(IDS) - 1
MORE = b"\ndata:"
"""Another event in the same chunk: it may hold ids, or tell of a failure."""

MOST = 64
"""Bytes of a list of ids on this path, some eight ids."""

NULLS = tuple(b"null".ljust(size) for size in range(MOST + 1))

PENDING = 16
"""Chunks noted at once, some 4 KiB: one by one it costs five times as much."""


def short_way(
    trail: Trail | None, sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take
) -> Take | None:
    """Return what forwards chunks of a stream whose beginning was looked at; None: nothing may.

    Args:
        trail: Notes the ids of the stream; None: it carries none.
        sse: Watches the stream.
        stamp: Notes the moment of output.
        send: Writes to the client.
        slow: Takes the content of a chunk for which no such path is made.
    """
    if trail is None:
        return passing(sse, stamp, send, slow)
    return stripping(trail, sse, stamp, send, slow) if trail.prompt else None


def passing(sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take) -> Take:
    """Return what forwards one chunk as it came, framing and all.

    Args:
        sse: Watches the stream.
        stamp: Notes the moment of output.
        send: Writes to the client.
        slow: Takes the content of a chunk for which this path is not made.
    """
    keep = sse.keep

    def take(data: bytes) -> None:
        if sse.part:
            slow(unframed(data))
            return
        send(data)
        if OUTPUT in data or OUTPUT_SPACED in data:
            stamp(monotonic())
        keep(data)

    return take


def stripping(
    trail: Trail, sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take
) -> Take:
    """Return what forwards one chunk without its token ids, which ``trail`` notes a little later.

    ``null`` and spaces stand in their place, so that the chunk keeps its length and its framing.
    """
    keep, pending, digest = sse.keep, trail.pending, trail.digest

    def take(data: bytes) -> None:
        at = data.find(IDS) + LEAD
        end = data.find(b"]", at) + 1
        size_bytes = end - at
        if at < LEAD or not 4 <= size_bytes <= MOST or data.find(MORE, end) > 0 or sse.part:
            slow(unframed(data))
            return
        send(b"%b%b%b" % (data[:at], NULLS[size_bytes], data[end:]))
        stamp(monotonic())
        keep(data)
        pending.append(data)
        if len(pending) >= PENDING:
            digest()

    return take
