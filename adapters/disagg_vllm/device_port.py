"""KV caches on an accelerator: gather on the device, copy through pinned memory on a side stream.

The forward pass never waits: the gather is queued on the compute stream right behind the attention
that wrote the layer (so later writes to the same blocks come after it), the copy to pinned host
memory runs on a side stream behind an event, and a thread of this port waits for the copy, moves
the bytes into the staging area and marks them readable. Loads run on a loader thread with a stream
of their own and are visible to the engine once ``finish_load`` returned.

The tensor arithmetic (``gather_plain``, ``scatter_plain``) knows no device and is tested on the
CPU for every layout; the streams need an accelerator.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from disagg_plugins.errors import UnsupportedEngineError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_vllm.caches import Axes

logger = logging.getLogger(__name__)

CLOSE_S = 5.0
"""How long closing waits for copies in flight; far above the copy of one layer."""


def _plain_view(tensor: torch.Tensor, axes: Axes, head_dim: int) -> torch.Tensor:
    """Return a view of one layer with axes ``b c t h d``, whatever the order in memory."""
    if axes[-1] == "cd":
        tensor = tensor.unflatten(-1, (2, head_dim))
        axes = (*axes[:-1], "c", "d")
    return tensor.permute([axes.index(name) for name in ("b", "c", "t", "h", "d")])


def gather_plain(
    tensor: torch.Tensor, axes: Axes, head_dim: int, block_ids: torch.Tensor
) -> torch.Tensor:
    """Return blocks of one layer as a contiguous tensor ``[n, 2, tokens, heads, head_dim]``.

    Args:
        tensor: One layer's KV cache.
        axes: Names of its axes.
        head_dim: Elements of one head.
        block_ids: int64, shape ``(n,)``, on the tensor's device.
    """
    return _plain_view(tensor, axes, head_dim).index_select(0, block_ids).contiguous()


def scatter_plain(
    tensor: torch.Tensor,
    axes: Axes,
    head_dim: int,
    block_ids: torch.Tensor,
    values: torch.Tensor,
    first_head: int,
    end_head: int,
) -> None:
    """Write ``values`` ``[n, 2, tokens, heads, head_dim]`` into blocks, heads of a range only."""
    view = _plain_view(tensor, axes, head_dim)[:, :, :, first_head:end_head]
    view[block_ids] = values


class DevicePort:
    """Moves rows between caches on an accelerator and byte buffers; see ``worker_side.CachePort``.

    Args:
        layers: One tensor a layer.
        axes: Names of the tensors' axes.
        layout: The layout rows are staged in: ``cthd``, plain.

    Raises:
        UnsupportedEngineError: The device has no streams that torch knows.
    """

    def __init__(self, layers: Sequence[torch.Tensor], axes: Axes, layout: KVLayout) -> None:
        import torch

        self._torch = torch
        self._layers = list(layers)
        self._axes = axes
        self._layout = layout
        self._device = layers[0].device
        if self._device.type != "cuda":
            raise UnsupportedEngineError(
                f"KV caches on device {self._device} are not supported: cpu and cuda are"
            )
        self._publish_stream = torch.cuda.Stream(self._device)
        self._load_streams = threading.local()
        self._ids: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None
        self._computed = torch.cuda.Event()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._copy, name="disagg-device-copy", daemon=True)
        self._thread.start()

    def publish(
        self,
        layer: int,
        block_ids: Sequence[int],
        out: NDArray[np.uint8],
        done: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """Queue the copy of blocks into ``out`` and return; the callbacks come in order."""
        torch = self._torch
        ids = self._device_ids(tuple(block_ids))
        rows = gather_plain(self._layers[layer], self._axes, self._layout.head_dim, ids)
        gathered = torch.cuda.Event()
        gathered.record(torch.cuda.current_stream(self._device))
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        with torch.cuda.stream(self._publish_stream):
            self._publish_stream.wait_event(gathered)
            host.copy_(rows, non_blocking=True)
            rows.record_stream(self._publish_stream)
            copied = torch.cuda.Event()
            copied.record(self._publish_stream)

        def finish() -> None:
            try:
                copied.synchronize()
                source = host.reshape(-1).view(torch.uint8).numpy()
                out[:] = source.reshape(out.shape)
            except Exception as error:
                failed(f"copying from {self._device} failed: {type(error).__name__}: {error}")
                return
            done()

        self._jobs.put(finish)

    def _device_ids(self, block_ids: tuple[int, ...]) -> torch.Tensor:
        """Return block ids on the device; copied once for all layers of a step, not blocking."""
        if self._ids is None or self._ids[0] != block_ids:
            torch = self._torch
            pinned = torch.tensor(block_ids, dtype=torch.int64, pin_memory=True)
            # The pinned original is kept: the copy may still read it.
            self._ids = (block_ids, pinned, pinned.to(self._device, non_blocking=True))
        return self._ids[2]

    def before_loads(self) -> None:
        """Mark what the compute stream has queued: loads of this step come after it."""
        self._computed.record(self._torch.cuda.current_stream(self._device))

    def after_publishes(self, action: Callable[[], None]) -> None:
        """Call ``action`` in the copy thread once every publish so far is done."""
        self._jobs.put(action)

    def _copy(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # A publication that is not told done or failed ends with its lease.
                logger.exception("telling the end of a copy from %s failed", self._device)

    def _load_stream(self) -> Any:
        if not hasattr(self._load_streams, "stream"):
            self._load_streams.stream = self._torch.cuda.Stream(self._device)
        return self._load_streams.stream

    def write_rows(self, layer: int, block_ids: Sequence[int], rows: memoryview) -> None:
        """Copy whole rows of this layout into blocks, over the calling thread's stream."""
        layout = self._layout
        shape = (
            len(block_ids),
            2,
            layout.block_size_tokens,
            layout.num_kv_heads_local,
            layout.head_dim,
        )
        self._write(layer, block_ids, rows, shape, 0, layout.num_kv_heads_local)

    def row_targets(self, layer: int, block_ids: Sequence[int]) -> None:
        """Return None: a transport cannot receive into device memory."""

    def write_canonical(
        self, layer: int, block_ids: Sequence[int], first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Copy canonical KV that starts at the first token of ``block_ids[0]``."""
        layout = self._layout
        heads, size = end_head - first_head, layout.block_size_tokens
        source = np.frombuffer(kv, np.uint8).reshape(
            2, -1, heads * layout.head_dim * (layout.element_bytes)
        )
        padded = np.zeros((2, len(block_ids) * size, source.shape[2]), np.uint8)
        padded[:, : source.shape[1]] = source
        rows = padded.reshape(2, len(block_ids), -1).transpose(1, 0, 2)
        shape = (len(block_ids), 2, size, heads, layout.head_dim)
        plain = np.ascontiguousarray(rows).reshape(-1).data
        self._write(layer, block_ids, plain, shape, first_head, end_head)

    def _write(
        self,
        layer: int,
        block_ids: Sequence[int],
        rows: memoryview,
        shape: tuple[int, ...],
        first_head: int,
        end_head: int,
    ) -> None:
        torch = self._torch
        tensor = self._layers[layer]
        host = torch.empty(shape, dtype=tensor.dtype, pin_memory=True)
        host.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(rows, np.uint8)
        ids = torch.tensor(block_ids, dtype=torch.int64, pin_memory=True)
        stream = self._load_stream()
        with torch.cuda.stream(stream):
            # Blocks that a step still in flight may write are not ours before it has ended.
            stream.wait_event(self._computed)
            values = host.to(self._device, non_blocking=True)
            scatter_plain(
                tensor,
                self._axes,
                self._layout.head_dim,
                ids.to(self._device, non_blocking=True),
                values,
                first_head,
                end_head,
            )

    def finish_load(self) -> None:
        """Return once everything this thread wrote is visible to the engine."""
        self._load_stream().synchronize()

    def unpack(self, rows: memoryview) -> memoryview:
        """Rows from a device are staged plain; nothing to do."""
        return rows

    def close(self) -> None:
        """End the copy thread after what is queued."""
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
