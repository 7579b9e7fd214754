"""Between block rows and canonical KV.

Elements are opaque: they are moved by size, never computed with, so a bfloat16 is a uint16 here.
Packed layouts are not handled: an engine's adapter unpacks its rows to plain ``hctd`` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.handoff.layouts import ELEMENT_BYTES, KVLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

_ELEMENT_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}

_TO_CBTHD = {
    # Axes of the rows after their block axis -> (c, block, t, h, d).
    "hctd": (2, 0, 3, 1, 4),
    "cthd": (1, 0, 2, 3, 4),
    "chtd": (1, 0, 3, 2, 4),
    "htcd": (3, 0, 2, 1, 4),
}


def rows_as_canonical(rows: npt.NDArray[np.uint8], layout: KVLayout) -> Array:
    """Return a view of plain rows with canonical axes; no copy.

    Args:
        rows: uint8, contiguous, shape ``(num_blocks, row_bytes)``.
        layout: Of the rows; its packing is not looked at.

    Returns:
        Shape ``(2, num_blocks, block_size_tokens, num_kv_heads_local, head_dim)``.
    """
    h, t, d = layout.num_kv_heads_local, layout.block_size_tokens, layout.head_dim
    shape = {
        "hctd": (h, 2, t, d),
        "cthd": (2, t, h, d),
        "chtd": (2, h, t, d),
        "htcd": (h, t, 2, d),
    }[layout.order]
    elements = rows.view(_ELEMENT_TYPES[ELEMENT_BYTES[layout.dtype]])
    return elements.reshape(len(rows), *shape).transpose(_TO_CBTHD[layout.order])


def to_canonical(
    rows: npt.NDArray[np.uint8],
    layout: KVLayout,
    *,
    first_token: int,
    num_tokens: int,
    first_head: int,
    end_head: int,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Copy a token and head range out of plain rows.

    Args:
        rows: uint8, contiguous, shape ``(num_blocks, row_bytes)``.
        layout: Of the rows.
        first_token: Token of ``rows`` (0 is the first of row 0) to start with.
        num_tokens: Tokens to copy.
        first_head: First *global* KV head.
        end_head: End of the half-open global head range.
        out: uint8, contiguous, at least as long as what is returned, which then is its beginning;
            None: new memory, whose pages cost more than the copying (128 MiB in layers of 4 MiB:
            1.9 instead of 5 GB per CPU-second).

    Returns:
        uint8, contiguous bytes of elements ``[2, num_tokens, heads, head_dim]``.

    Raises:
        LocalProtocolError: The rows do not hold the ranges, or ``out`` is too short.
    """
    heads = _local_heads(layout, first_head, end_head)
    source = rows_as_canonical(rows, layout)
    _check_tokens(layout, len(rows), first_token, num_tokens)
    num_bytes = layout.canonical_bytes(num_tokens, end_head - first_head)
    flat = np.empty(num_bytes, np.uint8) if out is None else out[:num_bytes]
    if flat.nbytes != num_bytes:
        raise LocalProtocolError(f"{num_bytes} bytes do not fit into {flat.nbytes}")
    kv = flat.view(source.dtype).reshape(2, num_tokens, end_head - first_head, layout.head_dim)
    for at, block, offset, count, blocks in _segments(
        first_token, num_tokens, layout.block_size_tokens
    ):
        piece = kv[:, at : at + count]
        target = piece.reshape(2, blocks, count // blocks, *piece.shape[2:])
        target[:] = source[:, block : block + blocks, offset : offset + count // blocks, heads]
    return flat


def from_canonical(
    kv: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.uint8],
    layout: KVLayout,
    *,
    first_token: int,
    first_head: int,
    end_head: int,
) -> None:
    """Copy canonical KV into plain rows; everything else in the rows stays as it is.

    Args:
        kv: uint8 bytes of elements ``[2, tokens, end_head - first_head, head_dim]``.
        rows: uint8, contiguous and writable, shape ``(num_blocks, row_bytes)``.
        layout: Of the rows.
        first_token: Token of ``rows`` that token 0 of ``kv`` goes to.
        first_head: First *global* KV head in ``kv``.
        end_head: End of the half-open global head range.

    Raises:
        LocalProtocolError: The rows do not hold the ranges, or ``kv`` has another size.
    """
    heads = _local_heads(layout, first_head, end_head)
    target = rows_as_canonical(rows, layout)
    token_bytes = layout.canonical_bytes(1, end_head - first_head)
    num_tokens, rest = divmod(kv.nbytes, token_bytes)
    if rest or not num_tokens:
        raise LocalProtocolError(f"{kv.nbytes} bytes are no multiple of {token_bytes} a token")
    _check_tokens(layout, len(rows), first_token, num_tokens)
    source = kv.view(target.dtype).reshape(2, num_tokens, end_head - first_head, layout.head_dim)
    for at, block, offset, count, blocks in _segments(
        first_token, num_tokens, layout.block_size_tokens
    ):
        piece = source[:, at : at + count]
        target[:, block : block + blocks, offset : offset + count // blocks, heads] = piece.reshape(
            2, blocks, count // blocks, *piece.shape[2:]
        )


def token_pieces(
    first_token: int, end_token: int, step_tokens: int, block_tokens: int
) -> Iterator[tuple[int, int]]:
    """Cut a half-open token range into half-open pieces that end on block boundaries.

    Args:
        first_token: First token; perhaps inside a block.
        end_token: End of the range.
        step_tokens: Whole blocks, the length of every piece but the first and the last.
        block_tokens: Tokens of a block.
    """
    while first_token < end_token:
        end = min(end_token, first_token // block_tokens * block_tokens + step_tokens)
        yield first_token, end
        first_token = end


def _segments(
    first_token: int, num_tokens: int, block_tokens: int
) -> list[tuple[int, int, int, int, int]]:
    """Cut a token range into a partial head block, whole blocks, and a partial tail block.

    Returns:
        ``(at, block, offset, count, blocks)``: ``count`` tokens from ``at`` of the range lie in
        ``blocks`` blocks from ``block`` on, each from ``offset`` within the block.
    """
    segments = []
    at = 0
    while at < num_tokens:
        block, offset = divmod(first_token + at, block_tokens)
        left = num_tokens - at
        if offset or left < block_tokens:
            count, blocks = min(block_tokens - offset, left), 1
        else:
            blocks = left // block_tokens
            count = blocks * block_tokens
        segments.append((at, block, offset, count, blocks))
        at += count
    return segments


def _local_heads(layout: KVLayout, first_head: int, end_head: int) -> slice:
    start, end = first_head - layout.head_start, end_head - layout.head_start
    if not 0 <= start < end <= layout.num_kv_heads_local:
        raise LocalProtocolError(
            f"heads [{first_head}, {end_head}) are not within this rank's "
            f"[{layout.head_start}, {layout.head_start + layout.num_kv_heads_local})"
        )
    return slice(start, end)


def _check_tokens(layout: KVLayout, num_blocks: int, first_token: int, num_tokens: int) -> None:
    held = num_blocks * layout.block_size_tokens
    if not 0 <= first_token < first_token + num_tokens <= held:
        raise LocalProtocolError(
            f"tokens [{first_token}, {first_token + num_tokens}) are not within {held} tokens"
        )
