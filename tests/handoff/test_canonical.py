"""Canonical form against a loop that is too simple to be wrong."""

from __future__ import annotations

from itertools import product
from typing import get_args

import numpy as np
import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.handoff.canonical import from_canonical, to_canonical
from disagg_plugins.handoff.layouts import ELEMENT_BYTES, KVLayout, RowOrder

BLOCK, BLOCKS, HEADS, DIM = 4, 3, 3, 5
DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def make(order: RowOrder, dtype: str = "bfloat16") -> tuple[KVLayout, np.ndarray]:
    layout = KVLayout(1, 8, 2, HEADS, DIM, dtype, BLOCK, order=order)
    rows = np.random.default_rng(3).integers(0, 256, (BLOCKS, layout.row_bytes), dtype=np.uint8)
    return layout, rows


def element(rows: np.ndarray, layout: KVLayout, h: int, c: int, token: int, d: int) -> int:
    """Return one element by counting, axis by axis."""
    block, t = divmod(token, BLOCK)
    flat = rows[block].view(DTYPES[layout.element_bytes])
    index = {
        "hctd": ((h * 2 + c) * BLOCK + t) * DIM + d,
        "cthd": ((c * BLOCK + t) * HEADS + h) * DIM + d,
        "chtd": ((c * HEADS + h) * BLOCK + t) * DIM + d,
        "htcd": ((h * BLOCK + t) * 2 + c) * DIM + d,
    }[layout.order]
    return int(flat[index])


RANGES = [(0, 12), (0, 4), (1, 3), (3, 2), (2, 10), (5, 6), (11, 1), (4, 5)]
HEAD_RANGES = [(2, 5), (2, 3), (3, 5), (4, 5)]


@pytest.mark.parametrize("order", get_args(RowOrder))
@pytest.mark.parametrize(("first", "count"), RANGES)
@pytest.mark.parametrize(("first_head", "end_head"), HEAD_RANGES)
def test_both_ways_equal_the_naive_loop(
    order: RowOrder, first: int, count: int, first_head: int, end_head: int
) -> None:
    layout, rows = make(order)
    flat = to_canonical(
        rows,
        layout,
        first_token=first,
        num_tokens=count,
        first_head=first_head,
        end_head=end_head,
    )
    kv = flat.view(np.uint16).reshape(2, count, end_head - first_head, DIM)
    for c, t, h, d in product(range(2), range(count), range(first_head, end_head), range(DIM)):
        assert kv[c, t, h - first_head, d] == element(rows, layout, h - 2, c, first + t, d)
    target = np.zeros_like(rows)
    from_canonical(
        flat, target, layout, first_token=first, first_head=first_head, end_head=end_head
    )
    for c, token, h, d in product(range(2), range(BLOCK * BLOCKS), range(2, 5), range(DIM)):
        inside = first <= token < first + count and first_head <= h < end_head
        wanted = element(rows, layout, h - 2, c, token, d) if inside else 0
        assert element(target, layout, h - 2, c, token, d) == wanted


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize("order", get_args(RowOrder))
def test_round_trip_of_every_element_size(order: RowOrder, dtype: str) -> None:
    layout, rows = make(order, dtype)
    kv = to_canonical(rows, layout, first_token=0, num_tokens=12, first_head=2, end_head=5)
    target = np.empty_like(rows)
    from_canonical(kv, target, layout, first_token=0, first_head=2, end_head=5)
    assert (target == rows).all()


@pytest.mark.parametrize(
    "change",
    [
        {"first_token": 1},
        {"first_token": -1},
        {"num_tokens": 0},
        {"first_head": 1},
        {"end_head": 6},
        {"first_head": 5},
    ],
)
def test_ranges_outside_are_refused(change: dict[str, int]) -> None:
    layout, rows = make("hctd")
    ranges = {"first_token": 0, "num_tokens": 12, "first_head": 2, "end_head": 5, **change}
    with pytest.raises(LocalProtocolError):
        to_canonical(rows, layout, **ranges)


def test_wrong_size_is_refused() -> None:
    layout, rows = make("hctd")
    with pytest.raises(LocalProtocolError, match="multiple"):
        from_canonical(np.zeros(7, np.uint8), rows, layout, first_token=0, first_head=2, end_head=5)
