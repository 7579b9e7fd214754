"""The Llama architecture over a paged KV cache: one forward pass for a batch of requests.

The tokens of all requests go through the linear layers together; attention is done request by
request over what its blocks hold. The ranks of a tensor-parallel engine run one after the other in
this process, and their partial sums are added as a collective would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from disagg_reference.config import ModelConfig, Rope
    from disagg_reference.pool import KVPool
    from disagg_reference.weights import LayerWeights, Weights

Hook = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """What is computed for one request.

    Attributes:
        tokens: The request's tokens up to the end of what is computed.
        start: Those of them whose KV is in the pool.
        blocks: Its blocks in order, with room for all of these.
        sampled: Whether the logits of the last one are asked for.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sampled: bool


class Llama:
    """A model on one device, and the KV pools of its ranks."""

    def __init__(self, config: ModelConfig, weights: Weights, pools: Sequence[KVPool]) -> None:
        self.config, self.pools = config, tuple(pools)
        self._weights = weights
        self._device = weights.embedding.device
        self._frequencies = rope_frequencies(config.rope, config.head_dim).to(self._device)

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece], before: Hook, after: Hook) -> torch.Tensor:
        """Compute the pieces, and keep their KV.

        Args:
            pieces: At least one.
            before: Called with each layer before its KV is read.
            after: Called with each layer when its new KV is in the pools.

        Returns:
            Logits, float32, shape ``(pieces that are sampled, vocab_size)``.
        """
        where = _Where.of(pieces, self.pools[0].shape.block_size_tokens, self._device)
        cos, sin = self._rotation(where.positions)
        hidden = F.embedding(where.tokens, self._weights.embedding)
        for layer in range(self.config.num_layers):
            parts = [rank[layer] for rank in self._weights.ranks]
            normed = self._norm(hidden, parts[0].before_attention)
            before(layer)
            hidden = hidden + _sum(
                self._attention(normed, part, pool, layer, where, cos, sin)
                for part, pool in zip(parts, self.pools, strict=True)
            )
            after(layer)
            normed = self._norm(hidden, parts[0].before_mlp)
            hidden = hidden + _sum(_mlp(normed, part) for part in parts)
        last = self._norm(hidden[where.sampled], self._weights.norm)
        return F.linear(last, self._weights.head).float()

    def _attention(
        self,
        normed: torch.Tensor,
        part: LayerWeights,
        pool: KVPool,
        layer: int,
        where: _Where,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        dim, kv_heads = self.config.head_dim, pool.shape.num_kv_heads_local
        heads = part.out.shape[1] // dim
        both = F.linear(normed, part.qkv).view(len(normed), heads + 2 * kv_heads, dim)
        rotated = _rotate(both[:, : heads + kv_heads], cos, sin)
        query, key = rotated[:, :heads], rotated[:, heads:]
        pool.write(layer, key, both[:, heads + kv_heads :], where.blocks, where.offsets)
        answers = []
        for piece in where.pieces:
            keys, values = pool.read(layer, piece.blocks, piece.end)
            found = F.scaled_dot_product_attention(
                query[piece.rows].transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=piece.mask,
                is_causal=piece.causal,
                enable_gqa=heads != kv_heads,
            )
            answers.append(found[0].transpose(0, 1).reshape(-1, heads * dim))
        return F.linear(torch.cat(answers), part.out)

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = values.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_eps)
        return wide.to(values.dtype) * weight

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None].float() * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        dtype = self._weights.embedding.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Return the rotary frequencies of half a head, float32, shape ``(head_dim // 2,)``.

    ``llama3`` keeps high frequencies, divides low ones by ``factor``, and blends in between
    (transformers 4.57, ``modeling_rope_utils.py``, ``_compute_llama3_parameters``).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "default":
        return frequencies
    if rope.type == "linear":
        return frequencies / rope.factor
    lengths = 2 * math.pi / frequencies
    low = rope.original_tokens / rope.low_freq_factor
    high = rope.original_tokens / rope.high_freq_factor
    smooth = (rope.original_tokens / lengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    found = torch.where(lengths > low, frequencies / rope.factor, frequencies)
    return torch.where((lengths <= low) & (lengths >= high), blended, found)


@dataclass(frozen=True, slots=True)
class _PieceWhere:
    """Where one request's tokens are among the batch's rows and in its blocks."""

    rows: slice
    blocks: torch.Tensor
    end: int
    mask: torch.Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class _Where:
    """The batch as index tensors."""

    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    sampled: torch.Tensor
    pieces: tuple[_PieceWhere, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece], size: int, device: torch.device) -> _Where:
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        sampled: list[int] = []
        found = []
        for piece in pieces:
            row, end = len(tokens), len(piece.tokens)
            count = end - piece.start
            tokens += piece.tokens[piece.start :]
            positions += range(piece.start, end)
            blocks += [piece.blocks[at // size] for at in range(piece.start, end)]
            if piece.sampled:
                sampled.append(row + count - 1)
            mask = None
            if piece.start and count > 1:
                mask = torch.ones(count, end, dtype=torch.bool, device=device).tril(piece.start)
            held = torch.tensor(piece.blocks[: -(-end // size)], device=device)
            causal = piece.start == 0 and count > 1
            found.append(_PieceWhere(slice(row, row + count), held, end, mask, causal))
        at = torch.tensor(positions, device=device)
        return cls(
            torch.tensor(tokens, device=device),
            at,
            torch.tensor(blocks, device=device),
            at % size,
            torch.tensor(sampled, dtype=torch.int64, device=device),
            tuple(found),
        )


def _rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-second, first], dim=-1) * sin


def _mlp(normed: torch.Tensor, part: LayerWeights) -> torch.Tensor:
    gate, up = F.linear(normed, part.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, part.down)


def _sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Add what the ranks computed."""
    first, *others = parts
    for other in others:
        first = first + other
    return first
