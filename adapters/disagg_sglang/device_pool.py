"""KV pools in device memory: pages move through tensors, synchronously in the caller's thread.

SGLang hands pages over when the forward pass that filled them has ended (it has read the sampled
token by then), and gives pages to a request before anything of it runs; so a stream of one's own
needs no event to wait for, only an end of each write before the caller goes on. The arithmetic is
the same on every device and is tested on CPU tensors. Loaded inside the engine only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from disagg_plugins.errors import HandoffAborted, UnsupportedEngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disagg_plugins.handoff.layouts import KVLayout

ELEMENT_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Elements are moved by size, never computed with."""


class DevicePool:
    """One rank's pages on a device; the methods are those of ``pools.HostPool``.

    Args:
        k_buffers: For each layer ``[slots, heads, head_dim]``, contiguous.
        v_buffers: The same for V.
        layout: Of this rank.

    Raises:
        UnsupportedEngineError: The device is neither CUDA (ROCm calls itself so) nor the CPU.
    """

    def __init__(
        self,
        k_buffers: Sequence[torch.Tensor],
        v_buffers: Sequence[torch.Tensor],
        layout: KVLayout,
    ) -> None:
        self._device = k_buffers[0].device
        if self._device.type not in ("cuda", "cpu"):
            raise UnsupportedEngineError(f"SGLang's KV pool is on {self._device}: not supported")
        self.layout = layout
        self._page_bytes = layout.row_bytes // 2
        self._layers = list(zip(k_buffers, v_buffers, strict=True))

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return int(self._layers[0][0].shape[0]) // self.layout.block_size_tokens

    def check_pages(self, page_ids: NDArray[np.int64]) -> None:
        """Raise unless every page is one of the pool's.

        Raises:
            HandoffAborted: One is not.
        """
        if len(page_ids) and not 0 <= page_ids.min() <= page_ids.max() < self.num_pages:
            raise HandoffAborted("-", f"pages outside of the pool's {self.num_pages} were named")

    def gather(self, layer: int, page_ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy pages into ``out`` (uint8, ``(pages, row_bytes)``, contiguous)."""
        index = self._index(page_ids)
        halves = [self._pages(buffer).index_select(0, index) for buffer in self._layers[layer]]
        torch.from_numpy(out).copy_(torch.cat(halves, dim=1))

    def scatter(self, layer: int, page_ids: NDArray[np.int64], rows: memoryview) -> None:
        """Copy whole rows into pages."""
        index = self._index(page_ids)
        staged = self._on_device(np.frombuffer(rows, np.uint8).reshape(-1, 2, self._page_bytes))
        for c, buffer in enumerate(self._layers[layer]):
            self._pages(buffer).index_copy_(0, index, staged[:, c])
        self._wait()

    def scatter_canonical(
        self,
        layer: int,
        page_ids: NDArray[np.int64],
        first_head: int,
        end_head: int,
        kv: memoryview,
    ) -> None:
        """Copy canonical KV that starts at the first token of ``page_ids[0]``; see ``HostPool``."""
        layout = self.layout
        size, heads, dim = layout.block_size_tokens, end_head - first_head, layout.head_dim
        element = ELEMENT_TYPES[layout.element_bytes]
        source = self._on_device(np.frombuffer(kv, np.uint8)).view(element)
        source = source.reshape(2, -1, heads, dim)
        slots = (page_ids[:, None] * size + np.arange(size)).reshape(-1)[: source.shape[1]]
        index = self._index(slots)
        for c, buffer in enumerate(self._layers[layer]):
            buffer.view(element)[:, first_head:end_head].index_copy_(0, index, source[c])
        self._wait()

    def _wait(self) -> None:
        """Return once what this thread wrote is in the pool: pages may be taken back after that."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _pages(self, buffer: torch.Tensor) -> torch.Tensor:
        pages = buffer[: self.num_pages * self.layout.block_size_tokens]
        return pages.view(torch.uint8).reshape(self.num_pages, self._page_bytes)

    def _index(self, ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.array(ids, np.int64)).to(self._device)

    def _on_device(self, data: NDArray[Any]) -> torch.Tensor:
        # Copied first: the bytes may lie in read-only memory, which tensors cannot stand for.
        return torch.from_numpy(np.array(data)).to(self._device)
