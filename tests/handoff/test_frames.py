"""The header, byte by byte."""

from __future__ import annotations

import random

import pytest

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.handoff.frames import (
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_DATA_BYTES,
    FrameType,
    Header,
    pack_frame,
    pack_header,
    parse_header,
)

DATA_OF_LAYER_5 = bytes.fromhex("444b 01 09 00000005 0000000000001000".replace(" ", ""))


def test_header_bytes() -> None:
    assert pack_header(FrameType.DATA, 4096, tag=5) == DATA_OF_LAYER_5
    parsed = parse_header(DATA_OF_LAYER_5, max_bytes=MAX_DATA_BYTES)
    assert parsed == Header(FrameType.DATA, 5, 4096)


def test_frame_is_header_and_payload() -> None:
    assert pack_frame(FrameType.END, b"abc") == pack_header(FrameType.END, 3) + b"abc"
    with pytest.raises(LocalProtocolError):
        pack_frame(FrameType.END, bytes(MAX_CONTROL_BYTES + 1))


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [(0, 0x45, "does not speak"), (2, 2, "version 2"), (3, 0, "type 0"), (3, 99, "type 99")],
)
def test_foreign_headers(at: int, value: int, match: str) -> None:
    data = bytearray(DATA_OF_LAYER_5)
    data[at] = value
    with pytest.raises(RemoteProtocolError, match=match):
        parse_header(data, max_bytes=MAX_DATA_BYTES)


@pytest.mark.parametrize("frame_type", FrameType)
def test_length_is_refused_before_it_is_read(frame_type: FrameType) -> None:
    limit = MAX_DATA_BYTES if frame_type is FrameType.DATA else MAX_CONTROL_BYTES
    parse_header(pack_header(frame_type, limit), max_bytes=MAX_DATA_BYTES)
    for too_long in (limit + 1, (1 << 64) - 1):
        with pytest.raises(RemoteProtocolError, match="announces"):
            parse_header(pack_header(frame_type, too_long), max_bytes=MAX_DATA_BYTES)
    with pytest.raises(RemoteProtocolError):
        parse_header(pack_header(frame_type, 11), max_bytes=10)


def test_noise_is_refused_as_a_protocol_error() -> None:
    source = random.Random(2)
    for _ in range(2000):
        with pytest.raises(RemoteProtocolError):
            parse_header(source.randbytes(HEADER_BYTES), max_bytes=MAX_DATA_BYTES)
