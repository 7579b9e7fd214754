"""The paged KV cache of one rank, in TensorRT-LLM's layout.

One tensor ``[num_blocks, num_layers, 2, num_kv_heads_local * block_size * head_dim]``; within a
block the axes are head, token, dim (HND). A block of all layers is contiguous, so whoever moves KV
takes ``tensor[block_id]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from disagg_plugins.handoff.layouts import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class PoolShape:
    """What the KV tensor of a rank means.

    Attributes:
        num_blocks: Blocks; block 0 is as good as any.
        num_layers: Layers.
        num_kv_heads: Of the model, over all ranks.
        num_kv_heads_local: Of this rank.
        head_dim: Elements of one head.
        block_size_tokens: Tokens of one block.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        tp_rank: Which rank.
        tp_size: Ranks of the engine.
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    num_kv_heads_local: int
    head_dim: int
    block_size_tokens: int
    dtype: str
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def layout(self) -> KVLayout:
        """The same for the handoff protocol."""
        return KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_start=self.tp_rank * self.num_kv_heads_local,
            num_kv_heads_local=self.num_kv_heads_local,
            head_dim=self.head_dim,
            dtype=self.dtype,
            block_size_tokens=self.block_size_tokens,
            order="chtd",
        )


class KVPool:
    """The KV cache of one rank.

    Attributes:
        tensor: shape ``(num_blocks, num_layers, 2, num_kv_heads_local * block_size * head_dim)``.
        shape: What it means.
    """

    def __init__(self, shape: PoolShape, device: torch.device) -> None:
        self.shape = shape
        row = shape.num_kv_heads_local * shape.block_size_tokens * shape.head_dim
        self.tensor = torch.zeros(
            (shape.num_blocks, shape.num_layers, 2, row), dtype=DTYPES[shape.dtype], device=device
        )
        self._by_head = self.tensor.view(
            shape.num_blocks,
            shape.num_layers,
            2,
            shape.num_kv_heads_local,
            shape.block_size_tokens,
            shape.head_dim,
        )

    def write(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Store the KV of some tokens.

        Args:
            layer: Layer.
            key: shape ``(tokens, num_kv_heads_local, head_dim)``, after RoPE.
            value: The same shape.
            blocks: int64, shape ``(tokens,)``: each token's block.
            offsets: int64, shape ``(tokens,)``: its place within the block.
        """
        self._by_head[:, layer, 0][blocks, :, offsets] = key
        self._by_head[:, layer, 1][blocks, :, offsets] = value

    def read(
        self, layer: int, blocks: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a request's first tokens.

        Args:
            layer: Layer.
            blocks: int64, shape ``(num_blocks,)``: its blocks in order.
            num_tokens: Tokens.

        Returns:
            Two of shape ``(num_kv_heads_local, num_tokens, head_dim)``.
        """
        shape = self.shape
        # one gather of both: [blocks, 2, heads, tokens of a block, dim]
        both = self._by_head[:, layer].index_select(0, blocks).permute(1, 2, 0, 3, 4)
        both = both.reshape(2, shape.num_kv_heads_local, -1, shape.head_dim)[:, :, :num_tokens]
        return both[0], both[1]

    def spoil(self, layer: int, head: int, blocks: Sequence[int]) -> None:
        """Turn the sign of one KV head's keys in one layer of some blocks: a planted fault.

        Args:
            layer: Layer.
            head: KV head of the model; nothing happens where another rank has it.
            blocks: Blocks.
        """
        local = head - self.shape.tp_rank * self.shape.num_kv_heads_local
        if 0 <= local < self.shape.num_kv_heads_local:
            self._by_head[list(blocks), layer, 0, local] *= -1


def gather_blocks(tensor: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor) -> None:
    """Copy whole blocks, all layers of each, to ``out`` of shape ``(len(blocks), ...)``."""
    torch.index_select(tensor, 0, blocks, out=out)


def scatter_blocks(tensor: torch.Tensor, blocks: torch.Tensor, source: torch.Tensor) -> None:
    """Copy ``source`` of shape ``(len(blocks), ...)`` to whole blocks."""
    tensor.index_copy_(0, blocks, source)
