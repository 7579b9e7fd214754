"""Frames: the fixed header that precedes everything on the wire.

16 bytes, big-endian: magic ``DK``, frame version, type, tag (the layer of a DATA frame, else 0),
payload length. Lengths are checked against what the receiver allows *before* a payload is read.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError

MAGIC = b"DK"
FRAME_VERSION = 1
HEADER = struct.Struct("!2sBBIQ")
HEADER_BYTES = HEADER.size

MAX_CONTROL_BYTES = 64 * 1024
"""Bound on every payload but DATA: the largest honest one is a READY of a few hundred layers."""

MAX_HELLO_BYTES = 1024
"""Bound before authentication; an honest HELLO has about 50 bytes."""

MAX_DATA_BYTES = 64 << 20
"""Bound on one layer of one READ; readers split longer loads."""

READY_ENTRY = struct.Struct("!IQQ")
"""One layer in a READY payload: layer, offset in the arena, length in bytes."""


class FrameType(IntEnum):
    """What a payload is."""

    HELLO = 1
    CHALLENGE = 2
    AUTH = 3
    WELCOME = 4
    CLAIM = 5
    OFFER = 6
    READ = 7
    READY = 8
    DATA = 9
    END = 10
    ENDED = 11
    ERROR = 12


class Header(NamedTuple):
    """A parsed header."""

    type: FrameType
    tag: int
    payload_bytes: int


def pack_header(frame_type: FrameType, payload_bytes: int, tag: int = 0) -> bytes:
    """Return the 16 bytes before a payload."""
    return HEADER.pack(MAGIC, FRAME_VERSION, frame_type, tag, payload_bytes)


def pack_frame(frame_type: FrameType, payload: bytes) -> bytes:
    """Return a whole control frame.

    Raises:
        LocalProtocolError: The payload is longer than any receiver accepts.
    """
    if len(payload) > MAX_CONTROL_BYTES:
        raise LocalProtocolError(
            f"{frame_type.name} of {len(payload)} bytes, at most {MAX_CONTROL_BYTES} are allowed"
        )
    return pack_header(frame_type, len(payload)) + payload


def parse_header(data: bytes | bytearray | memoryview, *, max_bytes: int) -> Header:
    """Read a header.

    Args:
        data: Exactly 16 bytes.
        max_bytes: The longest payload that is acceptable now.

    Raises:
        RemoteProtocolError: Not our magic or version, unknown type, or too long a payload.
    """
    magic, version, type_value, tag, payload_bytes = HEADER.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"the peer does not speak this protocol (magic {magic!r})")
    if version != FRAME_VERSION:
        raise RemoteProtocolError(
            f"the peer frames in version {version}, this side in {FRAME_VERSION}; "
            "run one version of disagg-plugins on both sides"
        )
    try:
        frame_type = FrameType(type_value)
    except ValueError as exc:
        raise RemoteProtocolError(f"unknown frame type {type_value}") from exc
    if frame_type is not FrameType.DATA:
        max_bytes = min(max_bytes, MAX_CONTROL_BYTES)
    if payload_bytes > max_bytes:
        raise RemoteProtocolError(
            f"{frame_type.name} announces {payload_bytes} bytes, at most {max_bytes} are allowed"
        )
    return Header(frame_type, tag, payload_bytes)
