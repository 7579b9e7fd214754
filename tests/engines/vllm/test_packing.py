"""The CPU cache's permutation, found with vLLM's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from disagg_plugins.errors import UnsupportedEngineError
from disagg_vllm.compat import cpu_write_block
from disagg_vllm.packing import discover_packing, packing_from_index

pytestmark = pytest.mark.engine

CASES = [
    (isa, dtype, block, dim, heads)
    for isa in ("amx", "vec", "vec16")
    for dtype in (torch.bfloat16, torch.float32)
    for block, dim, heads in ((128, 64, 3), (32, 64, 2), (32, 128, 1))
]


@pytest.mark.parametrize(("isa", "dtype", "block", "dim", "heads"), CASES)
def test_unpacked_rows_are_what_was_written(
    isa: str, dtype: torch.dtype, block: int, dim: int, heads: int
) -> None:
    write = cpu_write_block(isa)
    packing = discover_packing(
        write, isa=isa, num_heads=heads, block_size_tokens=block, head_dim=dim, dtype=dtype
    )
    assert packing.name.startswith("vllm-cpu-")
    generator = torch.Generator().manual_seed(7)
    key, value = torch.randn(2, block, heads, dim, generator=generator).to(dtype)
    cache = torch.zeros((1, heads, 2 * block, dim), dtype=dtype)
    write(key, value, cache)
    rows = cache.reshape(heads, -1).float().numpy()
    plain = torch.stack([key, value]).permute(2, 0, 1, 3).reshape(heads, -1).float().numpy()
    np.testing.assert_array_equal(packing.unpack(rows), plain)
    np.testing.assert_array_equal(packing.pack(plain), rows)


def test_an_instruction_set_that_loses_elements_is_refused() -> None:
    index = np.arange(64)
    index[3] = 4
    with pytest.raises(UnsupportedEngineError, match="not a permutation"):
        packing_from_index("odd", index)


def test_a_kernel_that_mixes_heads_is_refused() -> None:
    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor) -> None:
        tokens, heads, dim = key.shape
        both = torch.stack([key, value]).reshape(2 * tokens, heads, dim)
        cache[0].copy_(both.permute(1, 0, 2).flip(0))

    with pytest.raises(UnsupportedEngineError, match="mixes KV heads"):
        discover_packing(
            write, isa="odd", num_heads=2, block_size_tokens=32, head_dim=64, dtype=torch.float32
        )


def test_a_plain_cache_is_named_plain() -> None:
    assert packing_from_index("none", np.arange(64)).name == "plain"


@pytest.mark.parametrize("seed", range(3))
def test_a_permutation_without_axes_is_moved_element_by_element(seed: int) -> None:
    index = np.random.default_rng(seed).permutation(64)
    packing = packing_from_index("odd", index)
    assert packing.halves is None
    plain = np.arange(128.0).reshape(2, 64)
    np.testing.assert_array_equal(packing.pack(plain), plain[:, index])
    np.testing.assert_array_equal(packing.unpack(packing.pack(plain)), plain)


def test_halves_that_change_places_are_moved_element_by_element() -> None:
    index = np.roll(np.arange(64), 32)
    packing = packing_from_index("odd", index)
    assert packing.halves is None
    plain = np.arange(64.0).reshape(1, 64)
    np.testing.assert_array_equal(packing.pack(plain), plain[:, index])
