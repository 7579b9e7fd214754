"""The permutation that vLLM's CPU attention applies inside a KV block, found by experiment.

A block row of one head is ``[2 * block_size, head_dim]``: K half, V half, each permuted for the
instruction set (``amx``, ``vec``, ``vec16``; vLLM 0.32 ``csrc/cpu/cpu_attn_*.hpp``). Which
permutation it is, nobody documents, and it differs between releases; so it is found at start-up by
writing values that spell out their own index through the engine's own kernel and reading back where
they landed. A result that is no permutation is an error, never a guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from disagg_plugins.errors import UnsupportedEngineError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

DIGIT = 128
"""Index digits are written in base 128: bfloat16 holds every integer up to 256 exactly."""

WriteBlock = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], None]
"""``(key, value, cache)``: stores key and value, each ``[tokens, heads, head_dim]``, into the only
block of ``cache``, shape ``[1, heads, 2 * block_size, head_dim]``."""


Axes = tuple[tuple[int, int], ...]
"""Count and stride in the plain row, in elements, of each axis of a packed row, slowest first."""

SHORT_AXIS = 4
"""numpy's innermost loop runs over the target's fastest axis; one this short costs more to start
than it moves, so it is unrolled."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each element of a plain row stands in the engine's row.

    Attributes:
        name: ``plain``, or a digest of the permutation; equal names mean equal permutations.
        plain_index: int64, shape ``(2 * block_size * head_dim,)``: element ``i`` of a packed row
            of one head is element ``plain_index[i]`` of the plain row ``[k/v, token, head_dim]``.
        packed_index: The inverse.
        halves: The axes of the K and the V part where each is a transposition of itself, which
            moves about twice as fast as element by element; None where one is not.
    """

    name: str
    plain_index: NDArray[np.int64]
    packed_index: NDArray[np.int64]
    halves: tuple[Axes, Axes] | None = None

    def unpack(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return plain rows for packed rows, both of shape ``(n, 2 * block_size * head_dim)``."""
        if self.halves is None:
            return np.take(rows, self.packed_index, axis=1)
        out = np.empty_like(rows)
        for axes, packed, plain in zip(self.halves, _halved(rows), _halved(out), strict=True):
            packed, plain, _ = _aligned(packed, plain, axes)
            plain[:] = packed
        return out

    def pack(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return packed rows for plain rows, both of shape ``(n, 2 * block_size * head_dim)``."""
        if self.halves is None:
            return np.take(rows, self.plain_index, axis=1)
        out = np.empty_like(rows)
        for axes, packed, plain in zip(self.halves, _halved(out), _halved(rows), strict=True):
            packed, plain, fastest = _aligned(packed, plain, axes)
            if packed.shape[fastest] > SHORT_AXIS:
                packed[:] = plain
                continue
            for at in range(packed.shape[fastest]):
                packed.swapaxes(0, fastest)[at] = plain.swapaxes(0, fastest)[at]
        return out


def _halved(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the K and the V part of rows, as views."""
    half = rows.shape[1] // 2
    return [rows[:, :half], rows[:, half:]]


def _aligned(
    packed: NDArray[Any], plain: NDArray[Any], axes: Axes
) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return views of both with the same axes, and which of them is the fastest of ``packed``.

    Elements that stay together move as one of 2, 4 or 8 bytes.
    """
    width = itemsize = packed.itemsize
    together, step = axes[-1]
    if step == 1 and together * itemsize in (2, 4, 8):
        width = together * itemsize
        axes = tuple((count, by // together) for count, by in axes[:-1])
    order = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])
    shape = [count for count, _ in axes]
    packed = packed.view(f"u{width}").reshape(-1, *shape)
    plain = plain.view(f"u{width}").reshape(-1, *(shape[axis] for axis in order))
    packed = packed.transpose(0, *(axis + 1 for axis in order))
    return packed, plain, order.index(len(axes) - 1) + 1


def packing_from_index(isa: str, plain_index: NDArray[np.int64]) -> Packing:
    """Return the packing for an observed permutation.

    Raises:
        UnsupportedEngineError: ``plain_index`` is not a permutation.
    """
    size = len(plain_index)
    if not np.array_equal(np.sort(plain_index), np.arange(size)):
        raise UnsupportedEngineError(
            f"vLLM's CPU cache layout for instruction set {isa!r} is not a permutation of a block "
            f"({size} elements, {len(np.unique(plain_index))} distinct): this release of "
            "disagg-plugins cannot convert it; please report the engine's version"
        )
    packed_index = np.empty_like(plain_index)
    packed_index[plain_index] = np.arange(size)
    if np.array_equal(plain_index, np.arange(size)):
        name = "plain"
    else:
        name = f"vllm-cpu-{hashlib.sha256(plain_index.tobytes()).hexdigest()[:12]}"
    half = size // 2
    keys, values = _axes(plain_index[:half]), _axes(plain_index[half:] - half)
    halves = None if keys is None or values is None else (keys, values)
    return Packing(name, plain_index, packed_index, halves)


def _axes(index: NDArray[np.int64]) -> Axes | None:
    """Return the axes of the transposition that ``index`` is, or None when it is none."""
    if index[0] != 0:
        return None
    axes: list[tuple[int, int]] = []
    left = index
    while len(left) > 1:
        stride = left[1] - left[0]
        uneven = np.flatnonzero(np.diff(left) != stride)
        count = int(uneven[0]) + 1 if len(uneven) else len(left)
        if len(left) % count or count == 1:
            return None
        rows = left.reshape(-1, count)
        if stride < 1 or (rows != rows[:, :1] + np.arange(count) * stride).any():
            return None
        axes.append((count, int(stride)))
        left = rows[:, 0]
    expected = 1
    for count, stride in sorted(axes, key=lambda axis: axis[1]):
        if stride != expected:
            return None
        expected *= count
    return tuple(reversed(axes)) or None


def discover_packing(
    write_block: WriteBlock,
    *,
    isa: str,
    num_heads: int,
    block_size_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Packing:
    """Find the permutation by writing index digits through the engine's kernel.

    Raises:
        UnsupportedEngineError: The kernel mixes heads, or what it does is no permutation.
    """
    import torch

    half = block_size_tokens * head_dim
    plain = torch.arange(2 * half).reshape(2, block_size_tokens, 1, head_dim)
    digits = []
    for shift in (1, DIGIT, DIGIT * DIGIT):
        values = ((plain // shift) % DIGIT).expand(2, block_size_tokens, num_heads, head_dim)
        digits.append(_written(write_block, values, num_heads, block_size_tokens, head_dim, dtype))
    observed = digits[0] + digits[1] * DIGIT + digits[2] * DIGIT * DIGIT
    heads = torch.arange(num_heads).reshape(1, 1, num_heads, 1) % DIGIT
    heads = heads.expand(2, block_size_tokens, num_heads, head_dim)
    seen = _written(write_block, heads, num_heads, block_size_tokens, head_dim, dtype)
    mixes = (seen != np.arange(num_heads)[:, None] % DIGIT).any()
    if mixes or (observed != observed[0]).any():
        raise UnsupportedEngineError(
            f"vLLM's CPU cache layout for instruction set {isa!r} mixes KV heads inside a block; "
            "this release of disagg-plugins cannot convert it; please report the engine's version"
        )
    return packing_from_index(isa, observed[0])


def _written(
    write_block: WriteBlock,
    values: torch.Tensor,
    num_heads: int,
    block_size_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> NDArray[np.int64]:
    """Write ``values`` [k/v, token, head, dim] and return the rows read back: (heads, elements)."""
    import torch

    cache = torch.full((1, num_heads, 2 * block_size_tokens, head_dim), -1.0, dtype=dtype)
    key, value = values.to(dtype).contiguous()
    write_block(key, value, cache)
    rows: NDArray[np.int64] = cache[0].reshape(num_heads, -1).to(torch.int64).numpy()
    return rows
