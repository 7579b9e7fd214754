"""The hot path of streams: one chunk of whole events from a worker to a client."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from disagg_plugins.gateway.resumption import ERROR
from disagg_plugins.gateway.sse import OUTPUT, OUTPUT_SPACED
from disagg_plugins.gateway.trail import IDS

if TYPE_CHECKING:
    from disagg_plugins.gateway.sse import SseObserver
    from disagg_plugins.gateway.trail import Trail

Take = Callable[[bytes], None]


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
            slow(content(data))
            return
        send(data)
        if OUTPUT in data or OUTPUT_SPACED in data:
            stamp(monotonic())
        keep(data)

    return take


def stripping(
    trail: Trail, sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take
) -> Take:
    """Return what forwards one chunk without its token ids, which ``trail`` notes."""
    keep, strip = sse.keep, trail.take

    def take(data: bytes) -> None:
        if sse.part or IDS not in data or ERROR in data:
            slow(content(data))
            return
        data = strip(content(data))
        send(b"%x\r\n%b\r\n" % (len(data), data))
        stamp(monotonic())
        keep(data)

    return take


def content(chunk: bytes) -> bytes:
    """Return a chunk without its framing."""
    return chunk[chunk.find(b"\r\n") + 2 : -2]
