"""Engine KV tensors seen as block rows.

A ``CacheView`` knows the tensors that vLLM registered, one a layer, and moves whole block rows and
canonical KV in and out of them. The layout is read from shape and stride, never from a version:

=====================================  =====================================================
shape of one layer                     engine
=====================================  =====================================================
``[blocks, heads, tokens, 2 * dim]``   vLLM 0.32 and later, any stride order
``[2, blocks, tokens, heads, dim]``    FlashAttention before 0.32
``[blocks, 2, tokens, heads, dim]``    FlashInfer and Triton before 0.32
``[blocks, 2, heads, tokens, dim]``    FlashInfer in HND order before 0.32
=====================================  =====================================================

Rows staged from the CPU are ``hctd`` in the CPU's own packing; rows from any other device are
plain ``cthd``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from disagg_plugins.errors import UnsupportedEngineError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Axes = tuple[str, ...]
"""Names of a tensor's axes: b = block, c = k/v, h = head, t = token, d = head dim; ``cd`` is the
fused ``2 * dim``."""


def read_axes(
    shape: Sequence[int], *, block_sizes_tokens: Sequence[int], num_heads: int, head_dim: int
) -> tuple[Axes, int]:
    """Return the axes of one layer's KV tensor and its own block size in tokens.

    Args:
        shape: The tensor's shape.
        block_sizes_tokens: Block sizes the kernel may use, the scheduler's first. A kernel may
            cut the scheduler's blocks into smaller ones.
        num_heads: KV heads of this rank.
        head_dim: Elements of one head.

    Raises:
        UnsupportedEngineError: The shape is none of the known ones.
    """
    for tokens in block_sizes_tokens:
        known: list[tuple[Axes, tuple[int | None, ...]]] = [
            (("b", "h", "t", "cd"), (None, num_heads, tokens, 2 * head_dim)),
            (("b", "t", "h", "cd"), (None, tokens, num_heads, 2 * head_dim)),
            (("b", "c", "t", "h", "d"), (None, 2, tokens, num_heads, head_dim)),
            (("b", "c", "h", "t", "d"), (None, 2, num_heads, tokens, head_dim)),
            (("c", "b", "t", "h", "d"), (2, None, tokens, num_heads, head_dim)),
            (("c", "b", "h", "t", "d"), (2, None, num_heads, tokens, head_dim)),
        ]
        for axes, sizes in known:
            if len(sizes) == len(shape) and all(
                want is None or want == have for want, have in zip(sizes, shape, strict=True)
            ):
                return axes, tokens
    raise UnsupportedEngineError(
        f"a KV cache tensor of shape {tuple(shape)} is none of the layouts that this release "
        f"reads ({num_heads} KV heads, head dim {head_dim}, block sizes "
        f"{list(block_sizes_tokens)}): latent (MLA), quantised and recurrent caches "
        "cannot be handed over"
    )


def runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield ``(position, first_id, count)`` for each run of consecutive ids."""
    start = 0
    for i in range(1, len(block_ids) + 1):
        if i == len(block_ids) or block_ids[i] != block_ids[i - 1] + 1:
            yield start, block_ids[start], i - start
            start = i


def expand(block_ids: Sequence[int], ratio: int) -> list[int]:
    """Return the kernel's block ids for the scheduler's, each cut into ``ratio`` pieces."""
    if ratio == 1:
        return list(block_ids)
    return [block * ratio + piece for block in block_ids for piece in range(ratio)]


def layer_order(kv_caches: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the layer names in the model's order: by the number in the name.

    Raises:
        UnsupportedEngineError: Names without exactly one number each, or layers that share
            one cache tensor.
    """

    def number(name: str) -> int:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if len(numbers) != 1:
            raise UnsupportedEngineError(
                f"the order of layer {name!r} cannot be read from its name; nested layer numbers "
                "are not supported"
            )
        return numbers[0]

    names = sorted(kv_caches, key=number)
    pointers = {kv_caches[name].data_ptr() for name in names}
    if len(pointers) != len(names):
        raise UnsupportedEngineError(
            f"{len(names)} layers share {len(pointers)} cache tensors; models whose layers share "
            "KV cannot be handed over"
        )
    return names


class HostCaches:
    """KV tensors in host memory, as rows of bytes.

    Args:
        layers: One tensor a layer with axes ``b h t cd``, contiguous.
        row_bytes: Bytes of one block row.
    """

    def __init__(self, layers: Sequence[torch.Tensor], row_bytes: int) -> None:
        import torch

        self._rows: list[NDArray[np.uint8]] = []
        for tensor in layers:
            if not tensor.is_contiguous():
                raise UnsupportedEngineError(
                    f"a host KV cache with strides {tensor.stride()} is not contiguous"
                )
            rows = tensor.view(tensor.shape[0], -1).view(torch.uint8).numpy()
            if rows.shape[1] != row_bytes:
                raise UnsupportedEngineError(
                    f"a host KV block has {rows.shape[1]} bytes where {row_bytes} were expected"
                )
            self._rows.append(rows)

    def gather(
        self,
        layer: int,
        block_ids: Sequence[int],
        out: NDArray[np.uint8],
    ) -> None:
        """Copy blocks of ``layer`` into ``out``, uint8 of shape ``(len(block_ids), row_bytes)``."""
        rows = self._rows[layer]
        for position, first, count in runs(block_ids):
            out[position : position + count] = rows[first : first + count]

    def scatter(
        self,
        layer: int,
        block_ids: Sequence[int],
        rows: NDArray[np.uint8],
    ) -> None:
        """Copy ``rows`` into blocks of ``layer``; the reverse of ``gather``."""
        target = self._rows[layer]
        for position, first, count in runs(block_ids):
            target[first : first + count] = rows[position : position + count]

    def block(self, layer: int, block_id: int) -> NDArray[np.uint8]:
        """Return the writable row of one block."""
        return self._rows[layer][block_id]

    def targets(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        """Return writable bytes of blocks, in order, one view for each run of consecutive ids."""
        rows = self._rows[layer]
        return [rows[first : first + count].reshape(-1).data for _, first, count in runs(block_ids)]
