"""The hot path of streams: one read that is exactly one HTTP chunk of whole events.

A stream of tokens is made of such reads. Their framing is compared with what it must be instead of
being parsed, and they go to the client with the framing they came with. Everything here happens
once a token: the order of the comparisons is that of their cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from disagg_plugins.gateway.sse import OUTPUT, OUTPUT_SPACED
from disagg_plugins.gateway.trail import IDS, MAX_ID_DIGITS, MAX_TOKENS, unframed

if TYPE_CHECKING:
    from disagg_plugins.gateway.sse import SseObserver
    from disagg_plugins.gateway.trail import Trail

Take = Callable[[bytes], None]
TakeChunk = Callable[[bytes], bool]
"""Takes a read; False: it is not exactly one chunk of whole events, and nothing was done."""

LEAD = len(IDS) - 1
END = b"\n\n\r\n"
"""How a chunk ends whose events are whole."""

MOST = 64
"""Bytes of a list of ids on this path, some eight ids."""

NULLS = tuple(b"null".ljust(size) for size in range(MOST + 1))

MIN_BYTES = 40
"""Shorter reads are worth a look: the end of a stream is among them."""

NEVER = b"\r"
"""No chunk begins so."""

TEXTS = (b'"text":"', b'"content":"')
"""What comes before the text of an event: of a completion, of a chat."""

BACKSLASH = ord("\\")

MAX_FORMS = 8
"""How often the form of a stream's events is learnt; an engine has one, with a few odd events."""


def head(read_bytes: int) -> bytes:
    """Return how a read of this length begins if it is exactly one chunk."""
    for digits in range(1, 9):
        line = b"%x\r\n" % max(0, read_bytes - digits - 4)
        if len(line) == digits + 2:
            return line if read_bytes > MIN_BYTES else NEVER
    return NEVER


MAX_HEADS = 2048
HEADS = tuple(map(head, range(MAX_HEADS)))
"""By the length of the read; events of one token stay below 512 bytes."""


def one_chunk(data: bytes) -> bool:
    """Return whether a read is exactly one chunk that ends with an event."""
    size = len(data)
    line = HEADS[size] if size < MAX_HEADS else head(size)
    return data.startswith(line) and data.endswith(END)


@functools.lru_cache(maxsize=64)
def _ends(tail: bytes) -> tuple[bytes, ...]:
    """Return what stands in place of an id and ``tail``, by the digits of the id."""
    return tuple(b"null".ljust(n + 2) + tail[1:] for n in range(MAX_ID_DIGITS + 1))


def short_way(
    trail: Trail | None, sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take
) -> TakeChunk | None:
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
    return stripping(trail, sse, stamp, send, slow) if trail.knows_prompt else None


def passing(sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take) -> TakeChunk:
    """Return what forwards one chunk as it came, framing and all.

    Args:
        sse: Watches the stream.
        stamp: Notes the moment of output.
        send: Writes to the client.
        slow: Takes the content of a chunk for which this path is not made.
    """
    keep = sse.keep

    def take(data: bytes) -> bool:
        if not one_chunk(data):
            return False
        if sse.part:
            slow(unframed(data))
            return True
        send(data)
        if OUTPUT in data or OUTPUT_SPACED in data:
            stamp(monotonic())
        keep(data)
        return True

    return take


def stripping(
    trail: Trail, sse: SseObserver, stamp: Callable[[float], None], send: Take, slow: Take
) -> TakeChunk:
    """Return what forwards one chunk without its token ids, which ``trail`` notes.

    ``null`` and spaces stand in their place, so that the chunk keeps its length and its framing.

    An engine's events differ in nothing but text and id. Once their form is learnt, an event is
    compared with it: the same bytes up to the text, no quote within it, the same bytes from there
    to the id and after it. Such an event has text, one id and nothing else to be noted: no finish
    reason, no usage, no tool call. All others are looked at by ``other``.
    """
    note_id, ids = trail.ids.append, trail.ids
    lead = middle = tail = NEVER
    lead_bytes = middle_bytes = tail_bytes = forms = 0
    ends: tuple[bytes, ...] = ()

    def take(data: bytes) -> bool:
        size = len(data)
        line = HEADS[size] if size < MAX_HEADS else head(size)
        if not data.startswith(line):
            return False
        begin = len(line)
        if data.startswith(lead, begin) and data.endswith(tail):
            begin += lead_bytes
            text_end = data.find(b'"', begin)
            at = text_end + middle_bytes
            end = size - tail_bytes
            if (
                text_end > begin
                and data.startswith(middle, text_end)
                and 1 < end - at <= MAX_ID_DIGITS
                and (said := data[at:end]).isdigit()
                and len(ids) < MAX_TOKENS
                and not sse.part
            ):
                send(data[: at - 1] + ends[end - at])
                stamp(monotonic())
                note_id(int(said))
                return True
        if not data.endswith(END):
            return False
        other(data)
        return True

    def other(data: bytes) -> None:
        at = data.find(IDS) + LEAD
        end = data.find(b"]", at) + 1
        one_event = data.find(b"\n", data.find(b"\n") + 1) == len(data) - len(END)
        if at < LEAD or not 4 <= end - at <= MOST or not one_event or sse.part:
            slow(unframed(data))
            return
        stripped = b"%b%b%b" % (data[:at], NULLS[end - at], data[end:])
        send(stripped)
        stamp(monotonic())
        sse.keep(data)
        trail.note(data[at + 1 : end - 1], unframed(stripped))
        if forms < MAX_FORMS:
            learn(data, at + 1, end - 1)

    def learn(data: bytes, at: int, end: int) -> None:
        nonlocal lead, middle, tail, ends, forms, lead_bytes, middle_bytes, tail_bytes
        begin = max([data.find(text, 0, at) + len(text) for text in TEXTS])
        text_end = data.find(b'"', begin)
        first = data.find(b"data:")
        if not first < begin < text_end < at or data[text_end - 1] == BACKSLASH:
            return
        forms += 1
        lead, middle, tail = data[data.find(b"\n") + 1 : begin], data[text_end:at], data[end:]
        lead_bytes, middle_bytes, tail_bytes = len(lead), len(middle), len(tail)
        ends = _ends(tail)

    return take
