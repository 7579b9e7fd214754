"""How an engine stores KV, what model it serves, and the canonical form between unlike layouts.

Canonical KV of one layer is ``[k/v, token, kv_head, head_dim]``, keys after RoPE, elements opaque
(a bfloat16 travels as two bytes). A *block row* is one block of one layer as the publisher stages
it: ``row_bytes`` contiguous bytes whose order the layout names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from disagg_plugins.errors import ConfigError, IncompatiblePeerError

PROTOCOL_VERSION = 1
"""Raised whenever a frame, a rule or the meaning of a field changes."""

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

RowOrder = Literal["hctd", "cthd", "chtd", "htcd"]
"""Order of a block row's axes: h = KV head of this rank, c = k/v, t = token of the block,
d = head dim. ``htcd`` keeps K and V of one token side by side (``[h, t, 2*d]``); ``chtd`` is
TensorRT-LLM's HND order."""


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """What must be equal on both sides of a handoff, whatever the engine or the layout.

    Attributes:
        model: Identity of the weights (digest of configuration and weight files), not a path.
        dtype: KV dtype as torch spells it without the prefix: ``bfloat16``.
        num_layers: Layers that hold KV.
        num_kv_heads: Global number of KV heads.
        head_dim: Elements of one head.
        rope: Canonical JSON of the rotary settings (theta, scaling), or ``none``.
    """

    model: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str

    def digest(self) -> str:
        """Return 16 hexadecimal digits that change with any field."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How one rank of an engine stages its KV.

    Attributes:
        num_layers: Layers of this rank.
        num_kv_heads: Global number of KV heads.
        head_start: First global KV head of this rank.
        num_kv_heads_local: KV heads of this rank: the half-open range
            ``[head_start, head_start + num_kv_heads_local)``.
        head_dim: Elements of one head.
        dtype: KV dtype, a key of ``ELEMENT_BYTES``.
        block_size_tokens: Tokens of one block.
        order: Order of the axes inside a block row.
        packing: ``plain``, or the name and digest of an engine's own permutation inside the row;
            rows of unlike packing never move as they are.
    """

    num_layers: int
    num_kv_heads: int
    head_start: int
    num_kv_heads_local: int
    head_dim: int
    dtype: str
    block_size_tokens: int
    order: RowOrder = "hctd"
    packing: str = "plain"

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ConfigError(
                f"KV dtype {self.dtype!r} is not supported",
                key="dtype",
                fix=f"use one of {', '.join(ELEMENT_BYTES)}",
            )
        if min(self.num_layers, self.num_kv_heads_local, self.head_dim) < 1:
            raise ConfigError(f"layout with an empty axis: {self}")
        if self.block_size_tokens < 1:
            raise ConfigError(f"block_size_tokens must be positive, got {self.block_size_tokens}")
        if not 0 <= self.head_start <= self.num_kv_heads - self.num_kv_heads_local:
            raise ConfigError(
                f"heads [{self.head_start}, {self.head_start + self.num_kv_heads_local}) are not "
                f"within the model's {self.num_kv_heads} KV heads"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one block row: 2 x heads of this rank x head_dim x block size x element."""
        return (
            2
            * self.num_kv_heads_local
            * self.head_dim
            * self.block_size_tokens
            * (self.element_bytes)
        )

    def num_blocks(self, num_tokens: int) -> int:
        """Return the blocks that hold ``num_tokens`` tokens, the last one perhaps partly."""
        return -(-num_tokens // self.block_size_tokens)

    def staged_bytes(self, num_tokens: int) -> int:
        """Return the staging bytes of ``num_tokens`` tokens over all layers of this rank."""
        return self.num_layers * self.num_blocks(num_tokens) * self.row_bytes

    def canonical_bytes(self, num_tokens: int, num_heads: int) -> int:
        """Return the bytes of one canonical layer: 2 x tokens x heads x head_dim x element."""
        return 2 * num_tokens * num_heads * self.head_dim * self.element_bytes


def check_compatible(
    ours: ModelFingerprint, theirs: ModelFingerprint, *, our_name: str, their_name: str
) -> None:
    """Raise unless KV of one side is valid on the other.

    Raises:
        IncompatiblePeerError: Some field differs; the error lists every one of them.
    """
    a, b = asdict(ours), asdict(theirs)
    mismatches = [(field, a[field], b[field]) for field in a if a[field] != b[field]]
    if mismatches:
        raise IncompatiblePeerError(mismatches, ours=our_name, theirs=their_name)
