"""How canonical KV reaches the sink: mapped rows cross no socket, and pieces are bounded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.handoff import load
from disagg_plugins.handoff.canonical import to_canonical, token_pieces
from disagg_plugins.handoff.connection import Connection
from disagg_plugins.handoff.layouts import KVLayout
from disagg_plugins.testing.handoffs import LAYERS, RecordingSink, World, rank_identity

TRANSPORTS = {"shm": ShmTransport, "tcp": TcpTransport}


def same(rows: memoryview) -> memoryview:
    """Unpack rows that a test only calls packed."""
    return rows


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in reversed(made):
        world.close()


def refuse(*_: object) -> None:
    raise RuntimeError("rows went through the socket")


@pytest.mark.parametrize(
    ("change", "first"), [({"order": "cthd"}, 5), ({"block_size_tokens": 1}, 0), ({}, 5)]
)
def test_plain_rows_in_shared_memory_are_converted_by_the_reader(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, change: dict[str, object], first: int
) -> None:
    monkeypatch.setattr(Connection, "_send_canonical", refuse)
    worlds.append(world := World({"shm": ShmTransport()}))
    opened, sink = world.open(), RecordingSink()
    reader = world.reader(rank_identity("decode", **change))  # type: ignore[arg-type]
    report = world.load(opened, sink, reader=reader, first_token=first, end_token=39)
    assert (report.form, report.num_tokens) == ("canonical", 39 - first)
    for layer in range(LAYERS):
        assert sink.layer(layer) == opened.canonical(world.store, 0, layer, first, 39)
    assert report.payload_bytes == sum(len(sink.layer(each)) for each in range(LAYERS))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("packing", ["plain", "odd"])
def test_the_sink_gets_canonical_kv_in_pieces_of_whole_blocks(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, transport: str, packing: str
) -> None:
    monkeypatch.setattr(load, "PIECE_BYTES", 1)
    worlds.append(
        world := World({transport: TRANSPORTS[transport]()}, packing=packing, unpack=same)
    )
    opened, sink = world.open(), RecordingSink()
    reader = world.reader(rank_identity("decode", order="cthd", block_size_tokens=8))
    report = world.load(opened, sink, reader=reader, first_token=5, end_token=39)
    assert sorted({first for _, first, _ in sink.canonical}) == [5, 8, 16, 24, 32]
    for layer in range(LAYERS):
        whole = opened.canonical(world.store, 0, layer, 5, 39)
        keys = [data[: len(data) // 2] for data in pieces_of(sink, layer)]
        values = [data[len(data) // 2 :] for data in pieces_of(sink, layer)]
        assert b"".join(keys + values) == whole
    assert report.payload_bytes == LAYERS * len(whole)


def pieces_of(sink: RecordingSink, layer: int) -> list[bytes]:
    """Return what came of one layer, by first token."""
    return [data for key, data in sorted(sink.canonical.items()) if key[0] == layer]


def test_pieces_end_on_block_boundaries() -> None:
    assert list(token_pieces(5, 39, 16, 8)) == [(5, 16), (16, 32), (32, 39)]
    assert list(token_pieces(0, 8, 16, 8)) == [(0, 8)]
    assert list(token_pieces(4, 4, 16, 8)) == []


def test_canonical_kv_goes_to_the_beginning_of_memory_that_is_given() -> None:
    layout = KVLayout(1, 2, 0, 2, 4, "bfloat16", 4)
    rows = np.random.default_rng(1).integers(0, 256, (2, layout.row_bytes), dtype=np.uint8)
    out = np.full(300, 9, np.uint8)

    def convert(out: np.ndarray | None) -> np.ndarray:
        return to_canonical(
            rows, layout, first_token=1, num_tokens=6, first_head=0, end_head=2, out=out
        )

    expected = convert(None)
    assert np.array_equal(convert(out), expected)
    assert np.array_equal(out[: len(expected)], expected)
    assert (out[len(expected) :] == 9).all()
    with pytest.raises(LocalProtocolError, match="do not fit"):
        convert(out[:10])
