"""KV caches in host memory: rows move by plain copies in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_vllm.caches import HostCaches
    from disagg_vllm.packing import Packing

ELEMENT_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class HostPort:
    """Moves rows between vLLM's CPU caches and byte buffers; see ``worker_side.CachePort``."""

    def __init__(self, caches: HostCaches, layout: KVLayout, packing: Packing) -> None:
        self._caches = caches
        self._layout = layout
        self._packing = packing
        self._element = ELEMENT_TYPES[layout.element_bytes]
        self._head_elements = 2 * layout.block_size_tokens * layout.head_dim

    def publish(
        self,
        layer: int,
        block_ids: Sequence[int],
        out: NDArray[np.uint8],
        done: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """Copy blocks into ``out`` (uint8, ``(blocks, row_bytes)``), then call ``done``."""
        self._caches.gather(layer, block_ids, out)
        done()

    def before_loads(self) -> None:
        """Nothing to mark: host computation ends before a step does."""

    def after_publishes(self, action: Callable[[], None]) -> None:
        """Call ``action`` once every publish so far is done: at once, copies are synchronous."""
        action()

    def write_rows(self, layer: int, block_ids: Sequence[int], rows: memoryview) -> None:
        """Copy whole rows of this layout into blocks."""
        source = np.frombuffer(rows, np.uint8).reshape(len(block_ids), self._layout.row_bytes)
        self._caches.scatter(layer, block_ids, source)

    def row_targets(self, layer: int, block_ids: Sequence[int]) -> list[memoryview]:
        """Return where whole rows of these blocks lie, for a transport to receive into."""
        return self._caches.targets(layer, block_ids)

    def write_canonical(
        self, layer: int, block_ids: Sequence[int], first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Copy canonical KV that starts at the first token of ``block_ids[0]``.

        Args:
            layer: Layer of this rank.
            block_ids: Blocks that hold the tokens; the last one may be filled partly.
            first_head: First KV head, counted from this rank's first.
            end_head: End of the head range.
            kv: Bytes of ``[2, tokens, heads, head_dim]``.
        """
        size, dim, heads = (
            self._layout.block_size_tokens,
            self._layout.head_dim,
            end_head - first_head,
        )
        source = np.frombuffer(kv, self._element).reshape(2, -1, heads, dim)
        num_tokens = source.shape[1]
        plain = source
        if num_tokens < len(block_ids) * size:
            plain = np.zeros((2, len(block_ids) * size, heads, dim), self._element)
            plain[:, :num_tokens] = source
        by_block = plain.reshape(2, len(block_ids), size, heads, dim).transpose(1, 3, 0, 2, 4)
        packed = self._packing.pack(by_block.reshape(-1, self._head_elements))
        packed = packed.reshape(len(block_ids), heads, self._head_elements)
        for block_id, rows in zip(block_ids, packed, strict=True):
            target = self._caches.block(layer, block_id).view(self._element)
            target.reshape(-1, self._head_elements)[first_head:end_head] = rows

    def finish_load(self) -> None:
        """Return once everything written is visible to the engine: host copies are at once."""

    def unpack(self, rows: memoryview) -> memoryview:
        """Return plain ``hctd`` rows for rows as staged."""
        packed: NDArray[Any] = np.frombuffer(rows, self._element).reshape(-1, self._head_elements)
        return self._packing.unpack(packed).view(np.uint8).reshape(-1).data

    def close(self) -> None:
        """Nothing to give back."""
