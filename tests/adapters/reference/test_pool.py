"""KV lies where TensorRT-LLM keeps it, and blocks are copied whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from disagg_reference.pool import KVPool, PoolShape, gather_blocks, scatter_blocks

SHAPE = PoolShape(
    num_blocks=6,
    num_layers=3,
    num_kv_heads=4,
    num_kv_heads_local=2,
    head_dim=4,
    block_size_tokens=5,
    dtype="float32",
    tp_rank=1,
    tp_size=2,
)
CPU = torch.device("cpu")


def filled() -> tuple[KVPool, torch.Tensor, torch.Tensor]:
    """Return a pool with seven tokens in the blocks 4 and 2, and their keys and values."""
    pool = KVPool(SHAPE, CPU)
    draw = torch.Generator().manual_seed(1)
    key, value = (torch.randn(7, 2, 4, generator=draw) for _ in range(2))
    at = torch.arange(7)
    pool.write(1, key, value, torch.tensor([4, 2])[at // 5], at % 5)
    return pool, key, value


def test_a_block_is_layer_then_kv_then_head_then_token() -> None:
    pool, key, value = filled()
    assert pool.tensor.shape == (6, 3, 2, 2 * 5 * 4)
    block = pool.tensor[2].view(3, 2, 2, 5, 4)
    assert torch.equal(block[1, 0, :, :2], key[5:].transpose(0, 1))
    assert torch.equal(block[1, 1, :, :2], value[5:].transpose(0, 1))
    assert torch.count_nonzero(block[0]) == torch.count_nonzero(block[1, :, :, 2:]) == 0


@pytest.mark.parametrize("num_tokens", [1, 5, 6, 7])
def test_what_is_written_is_read(num_tokens: int) -> None:
    pool, key, value = filled()
    blocks = torch.tensor([4, 2][: -(-num_tokens // 5)])
    keys, values = pool.read(1, blocks, num_tokens)
    assert torch.equal(keys, key[:num_tokens].transpose(0, 1))
    assert torch.equal(values, value[:num_tokens].transpose(0, 1))


def test_the_layout_names_this_ranks_heads() -> None:
    layout = SHAPE.layout
    assert (layout.head_start, layout.num_kv_heads_local, layout.num_kv_heads) == (2, 2, 4)
    assert (layout.order, layout.block_size_tokens) == ("chtd", 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gathered_blocks_are_scattered_to_others(dtype: str) -> None:
    source, target = (KVPool(dataclasses.replace(SHAPE, dtype=dtype), CPU) for _ in range(2))
    source.tensor.copy_(torch.arange(source.tensor.numel()).view(source.tensor.shape) % 251)
    held = torch.empty(2, *source.tensor.shape[1:], dtype=source.tensor.dtype)
    gather_blocks(source.tensor, torch.tensor([5, 1]), held)
    scatter_blocks(target.tensor, torch.tensor([0, 3]), held)
    assert torch.equal(target.tensor[[0, 3]], source.tensor[[5, 1]])
    assert torch.count_nonzero(target.tensor[[1, 2, 4, 5]]) == 0


def test_one_head_of_one_layer_is_spoilt_on_the_rank_that_has_it() -> None:
    pool, key, _ = filled()
    before = pool.tensor.clone()
    pool.spoil(1, 1, [4, 2])  # the other rank's
    assert torch.equal(pool.tensor, before)
    pool.spoil(1, 3, [4, 2])
    keys, values = pool.read(1, torch.tensor([4, 2]), 7)
    assert torch.equal(keys[1], -key[:, 1])
    assert torch.equal(keys[0], key[:, 0])
    assert torch.equal(values, pool.read(1, torch.tensor([4, 2]), 7)[1])
    assert torch.equal(pool.tensor[:, [0, 2]], before[:, [0, 2]])
