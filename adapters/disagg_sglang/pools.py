"""KV pools in host memory: pages move by plain copies in the caller's thread.

A page of one layer lies in two buffers, K and V. Staged, it is one row ``[c, t, h, d]`` (order
``cthd``). Loaded inside the engine only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from disagg_plugins.errors import HandoffAborted, UnsupportedEngineError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from disagg_plugins.handoff.layouts import KVLayout

GATHER_BYTES = 256 << 10
"""Pages are gathered in pieces of about this size: numpy copies them twice, and the second copy
then reads from the core's cache (pages of 2 KiB: 8.6 instead of 5.4 GB per CPU-second)."""


class HostPool:
    """One rank's pages.

    Args:
        k_buffers: For each layer ``[slots, heads, head_dim]``, contiguous, on the CPU.
        v_buffers: The same for V.
        layout: Of this rank.

    Raises:
        UnsupportedEngineError: The buffers are on another device.
    """

    def __init__(
        self,
        k_buffers: Sequence[torch.Tensor],
        v_buffers: Sequence[torch.Tensor],
        layout: KVLayout,
    ) -> None:
        import torch

        device = k_buffers[0].device
        if device.type != "cpu":
            raise UnsupportedEngineError(
                f"SGLang's KV pool is on {device}: a host pool needs buffers in host memory"
            )
        self.layout = layout
        self._page_bytes = layout.row_bytes // 2
        # One page is one opaque element: a gather copies whole pages, whatever they hold.
        page = np.dtype((np.void, self._page_bytes))

        def pages(buffer: torch.Tensor) -> NDArray[Any]:
            flat = buffer.view(torch.uint8).reshape(-1).numpy()
            return flat[: flat.nbytes // self._page_bytes * self._page_bytes].view(page)

        self._layers = [(pages(k), pages(v)) for k, v in zip(k_buffers, v_buffers, strict=True)]

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._layers[0][0])

    def check_pages(self, page_ids: NDArray[np.int64]) -> None:
        """Raise unless every page is one of the pool's.

        Raises:
            HandoffAborted: One is not.
        """
        if len(page_ids) and not 0 <= page_ids.min() <= page_ids.max() < self.num_pages:
            raise HandoffAborted("-", f"pages outside of the pool's {self.num_pages} were named")

    def gather(self, layer: int, page_ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy pages into ``out`` (uint8, ``(pages, row_bytes)``, contiguous)."""
        halves = out.view(np.dtype((np.void, self._page_bytes)))
        step = max(1, GATHER_BYTES // self._page_bytes)
        for start in range(0, len(page_ids), step):
            piece = slice(start, start + step)
            for c, source in enumerate(self._layers[layer]):
                halves[piece, c] = source[page_ids[piece]]

    def scatter(self, layer: int, page_ids: NDArray[np.int64], rows: memoryview) -> None:
        """Copy whole rows into pages."""
        halves = np.frombuffer(rows, np.dtype((np.void, self._page_bytes))).reshape(-1, 2)
        for c, target in enumerate(self._layers[layer]):
            target[page_ids] = halves[:, c]

    def scatter_canonical(
        self,
        layer: int,
        page_ids: NDArray[np.int64],
        first_head: int,
        end_head: int,
        kv: memoryview,
    ) -> None:
        """Copy canonical KV that starts at the first token of ``page_ids[0]``.

        Args:
            layer: Layer of this rank.
            page_ids: Pages that hold the tokens; the last one may be filled partly.
            first_head: First KV head, counted from this rank's first.
            end_head: End of the head range.
            kv: Bytes of ``[2, tokens, heads, head_dim]``.
        """
        layout = self.layout
        size, head_bytes = layout.block_size_tokens, layout.head_dim * layout.element_bytes
        # The heads of one token are one opaque element, as they lie side by side on both sides.
        token = np.dtype((np.void, (end_head - first_head) * head_bytes))
        source = np.frombuffer(kv, token).reshape(2, -1)
        num_tokens = source.shape[1]
        slots = (page_ids[:, None] * size + np.arange(size)).reshape(-1)[:num_tokens]
        for c, pages in enumerate(self._layers[layer]):
            tokens = pages.view(np.uint8).reshape(-1, layout.num_kv_heads_local * head_bytes)
            target = tokens[:, first_head * head_bytes : end_head * head_bytes].view(token)[:, 0]
            target[slots] = source[c]


class Scatter(Protocol):
    """The pages that are written: when a call returns, its bytes are there."""

    layout: KVLayout

    def scatter(self, layer: int, page_ids: NDArray[np.int64], rows: memoryview) -> None:
        """Copy whole rows into pages."""
        ...

    def scatter_canonical(
        self,
        layer: int,
        page_ids: NDArray[np.int64],
        first_head: int,
        end_head: int,
        kv: memoryview,
    ) -> None:
        """Copy canonical KV that starts at the first token of ``page_ids[0]``."""
        ...


class PageSink:
    """Writes one request's KV into the pool until it is closed; see ``handoff.interfaces.Sink``.

    SGLang gives the pages to another request as soon as a load is given up, so after ``close`` has
    returned not one byte is written, whatever the loading thread is at.

    Args:
        pool: The pages.
        page_ids: Pages of the request from block ``first_block`` on.
        first_block: Blocks before it were there already.
    """

    def __init__(self, pool: Scatter, page_ids: NDArray[np.int64], first_block: int) -> None:
        self._pool = pool
        self._page_ids = page_ids
        self._first_block = first_block
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Let nothing be written from now on; waits for the copy of one piece at most."""
        with self._lock:
            self._closed = True

    def finish(self, write: Any) -> None:
        """Call ``write`` unless closed, and close.

        Raises:
            HandoffAborted: It was closed.
        """
        with self._lock:
            self._check_open()
            write()
            self._closed = True

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Take whole block rows of one layer."""
        count = rows.nbytes // self._pool.layout.row_bytes
        with self._lock:
            self._check_open()
            self._pool.scatter(layer, self._pages(first_block, count), rows)

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Take canonical KV of one layer; ``first_token`` lies on a page boundary."""
        layout = self._pool.layout
        num_tokens = kv.nbytes // layout.canonical_bytes(1, end_head - first_head)
        first_block, rest = divmod(first_token, layout.block_size_tokens)
        if rest:
            raise HandoffAborted("-", f"token {first_token} is inside a page; nothing was written")
        pages = self._pages(first_block, layout.num_blocks(num_tokens))
        first, end = first_head - layout.head_start, end_head - layout.head_start
        if not 0 <= first < end <= layout.num_kv_heads_local:
            # As a slice such a range may be empty, and then nothing would be written, silently.
            raise HandoffAborted(
                "-", f"the peer sent heads [{first_head}, {end_head}), which are not this rank's"
            )
        with self._lock:
            self._check_open()
            self._pool.scatter_canonical(layer, pages, first, end, kv)

    def _check_open(self) -> None:
        if self._closed:
            raise HandoffAborted("-", "the engine has given the request up")

    def _pages(self, first_block: int, count: int) -> NDArray[np.int64]:
        start = first_block - self._first_block
        if not 0 <= start <= start + count <= len(self._page_ids):
            raise HandoffAborted(
                "-",
                f"the peer sent blocks [{first_block}, {first_block + count}) of a request that "
                f"awaits [{self._first_block}, {self._first_block + len(self._page_ids)})",
            )
        return self._page_ids[start : start + count]
