"""Layouts read from shape and stride, and rows moved in and out of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from disagg_plugins.errors import UnsupportedEngineError
from disagg_vllm.caches import expand, layer_order, read_axes, runs
from disagg_vllm.device_port import gather_plain, scatter_plain

pytestmark = pytest.mark.engine

BLOCKS, TOKENS, HEADS, DIM = 6, 4, 3, 8

# Logical shape and the order of its axes in memory, as the engines make them.
LAYOUTS = [
    ((BLOCKS, HEADS, TOKENS, 2 * DIM), (0, 1, 2, 3)),  # LBHNC
    ((BLOCKS, HEADS, TOKENS, 2 * DIM), (0, 2, 1, 3)),  # LBNHC
    ((BLOCKS, HEADS, TOKENS, 2 * DIM), (1, 0, 2, 3)),  # LHBNC
    ((BLOCKS, 2, TOKENS, HEADS, DIM), (0, 1, 2, 3, 4)),  # FlashInfer NHD
    ((BLOCKS, 2, HEADS, TOKENS, DIM), (0, 1, 2, 3, 4)),  # FlashInfer HND
    ((2, BLOCKS, TOKENS, HEADS, DIM), (0, 1, 2, 3, 4)),  # FlashAttention
    ((2, BLOCKS, TOKENS, HEADS, DIM), (1, 0, 2, 3, 4)),  # the same, block first in memory
]


def make_cache(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of ``shape`` whose axes lie in memory in ``order``, with distinct values."""
    memory = torch.arange(int(np.prod(shape)), dtype=torch.float32)
    stored = memory.reshape([shape[axis] for axis in order])
    return stored.permute([order.index(axis) for axis in range(len(shape))])


def axes_of(cache: torch.Tensor) -> tuple[str, ...]:
    axes, tokens = read_axes(
        cache.shape, block_sizes_tokens=[TOKENS], num_heads=HEADS, head_dim=DIM
    )
    assert tokens == TOKENS
    return axes


@pytest.mark.parametrize(("shape", "order"), LAYOUTS)
def test_gather_gives_plain_rows_whatever_the_layout(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    cache = make_cache(shape, order)
    axes = axes_of(cache)
    rows = gather_plain(cache, axes, DIM, torch.tensor([4, 1]))
    assert rows.shape == (2, 2, TOKENS, HEADS, DIM)
    for n, c, t, h, d in itertools.product((0, 1), (0, 1), range(TOKENS), range(HEADS), (0, 5)):
        at = {"b": (4, 1)[n], "c": c, "t": t, "h": h, "d": d, "cd": c * DIM + d}
        assert rows[n, c, t, h, d] == cache[tuple(at[name] for name in axes)]


@pytest.mark.parametrize(("shape", "order"), LAYOUTS)
def test_scatter_writes_the_asked_blocks_and_heads_and_nothing_else(
    shape: tuple[int, ...], order: tuple[int, ...]
) -> None:
    source, target = make_cache(shape, order), make_cache(shape, order).clone()
    target.zero_()
    axes, ids = axes_of(source), torch.tensor([5, 0])
    values = gather_plain(source, axes, DIM, ids)[:, :, :, 1:3]
    scatter_plain(target, axes, DIM, ids, values, 1, 3)
    moved = gather_plain(target, axes, DIM, ids)
    assert torch.equal(moved[:, :, :, 1:3], values)
    assert not moved[:, :, :, :1].any()
    assert not gather_plain(target, axes, DIM, torch.tensor([1, 2, 3, 4])).any()


def test_a_kernel_block_smaller_than_the_schedulers_is_found() -> None:
    axes, tokens = read_axes(
        (10, HEADS, 16, 2 * DIM), block_sizes_tokens=[64, 32, 16], num_heads=HEADS, head_dim=DIM
    )
    assert (axes, tokens) == (("b", "h", "t", "cd"), 16)
    assert expand([2, 7], 4) == [8, 9, 10, 11, 28, 29, 30, 31]


def test_an_unknown_shape_is_refused_with_its_numbers() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"\(10, 576\)"):
        read_axes((10, 576), block_sizes_tokens=[16], num_heads=1, head_dim=576)


def test_runs_join_consecutive_blocks() -> None:
    assert list(runs([3, 4, 5, 9, 1, 2])) == [(0, 3, 3), (3, 9, 1), (4, 1, 2)]
    assert list(runs([])) == []


def test_layers_are_ordered_by_number_not_by_name() -> None:
    caches = {f"model.layers.{i}.self_attn.attn": torch.zeros(1) for i in (10, 2, 0)}
    assert [n.split(".")[2] for n in layer_order(caches)] == ["0", "2", "10"]


def test_layers_that_share_a_cache_are_refused() -> None:
    shared = torch.zeros(4)
    with pytest.raises(UnsupportedEngineError, match="share"):
        layer_order({"layers.0.attn": shared, "layers.1.attn": shared})
