"""KV that keeps all layers of a block together in host memory: published from, loaded into.

An engine whose cache is one array ``[num_blocks, num_layers, row_bytes]`` needs nothing else; one
whose cache is elsewhere stages blocks in such an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.errors import HandoffAborted, LocalProtocolError
from disagg_plugins.handoff.canonical import from_canonical

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_plugins.handoff.publications import Publication


def publish_blocks(
    publication: Publication, kv: NDArray[np.uint8], block_ids: Sequence[int]
) -> None:
    """Publish a whole prompt, layer by layer.

    Args:
        publication: As it was opened.
        kv: uint8, shape ``(num_blocks, num_layers, row_bytes)``.
        block_ids: Where in ``kv`` the prompt's blocks are, in order; more are left alone.

    Raises:
        LocalProtocolError: There are fewer blocks than the publication has, or one is none.
    """
    count = publication.num_blocks
    ids = np.asarray(block_ids[:count])
    if len(ids) < count or (count and not 0 <= ids.min() <= ids.max() < len(kv)):
        raise LocalProtocolError(
            f"handoff {publication.handoff_id} has {count} blocks; the engine gave "
            f"{list(block_ids[:8])}... of {len(kv)}"
        )
    for layer in range(kv.shape[1]):
        # not take: of a strided layer it would copy all blocks first
        publication.rows(layer)[:] = kv[ids, layer]
        publication.publish(layer, count)


class BlockSink:
    """Writes one request's KV into an array of blocks; see ``handoff.interfaces.Sink``.

    Args:
        kv: uint8, shape ``(num_blocks, num_layers, row_bytes)``.
        layout: Of the rows.
        block_ids: Where in ``kv`` the request's blocks are, from its block 0 on.
    """

    def __init__(self, kv: NDArray[np.uint8], layout: KVLayout, block_ids: Sequence[int]) -> None:
        self._kv, self._layout, self._block_ids = kv, layout, tuple(block_ids)

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Take whole block rows of one layer."""
        source = np.frombuffer(rows, np.uint8).reshape(-1, self._layout.row_bytes)
        self._kv[self._ids(first_block, len(source)), layer] = source

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Take canonical KV of one layer."""
        layout = self._layout
        num_tokens = kv.nbytes // layout.canonical_bytes(1, end_head - first_head)
        first_block, offset = divmod(first_token, layout.block_size_tokens)
        ids = self._ids(first_block, layout.num_blocks(offset + num_tokens))
        rows = self._kv[ids, layer]  # a copy: other heads and tokens stay as they are
        from_canonical(
            np.frombuffer(kv, np.uint8),
            rows,
            layout,
            first_token=offset,
            first_head=first_head,
            end_head=end_head,
        )
        self._kv[ids, layer] = rows

    def _ids(self, first_block: int, count: int) -> NDArray[np.int64]:
        ids = self._block_ids[first_block : first_block + count]
        if len(ids) != count or min(ids) < 0:
            raise HandoffAborted(
                "-",
                f"the peer sent blocks [{first_block}, {first_block + count}) of a request that "
                f"has {len(self._block_ids)}",
            )
        return np.asarray(ids, np.int64)
