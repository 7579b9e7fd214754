"""SGLang's metadata rows: the first token, the room and what else decode must know of prefill.

``MetadataBuffers`` (``srt/disaggregation/utils.py``, SGLang 0.5.23) are parallel buffers in host
memory; a request owns one row of each. Loaded inside the engine only.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from disagg_plugins.errors import RemoteProtocolError
from disagg_sglang.compat import VERSION
from disagg_sglang.result import PrefillResult, row_form

if TYPE_CHECKING:
    from collections.abc import Sequence


class MetadataRows:
    """Reads and writes rows.

    Args:
        buffers: SGLang's ``MetadataBuffers``.
        pointers: Address of each buffer (``KVArgs.aux_data_ptrs``).
        item_bytes: Bytes of one row of each (``KVArgs.aux_item_lens``).
    """

    def __init__(self, buffers: Any, pointers: Sequence[int], item_bytes: Sequence[int]) -> None:
        self._buffers = buffers
        self._pointers = tuple(pointers)
        self._item_bytes = tuple(item_bytes)
        self.form = row_form(VERSION, item_bytes)

    def read(self, row: int) -> PrefillResult:
        """Return what prefill wrote into a row (``MetadataBuffers.set_buf``)."""
        pieces = [
            ctypes.string_at(pointer + row * size, size)
            for pointer, size in zip(self._pointers, self._item_bytes, strict=True)
        ]
        return PrefillResult(
            first_token=int(self._buffers.output_ids[row, 0]),
            cached_tokens=int(self._buffers.cached_tokens[row, 0]),
            form=self.form,
            row=b"".join(pieces),
        )

    def write(self, row: int, room: int, result: PrefillResult) -> None:
        """Write a row of another worker, its room last: by the room SGLang sees that it is there.

        Raises:
            RemoteProtocolError: The row has another size than its form says.
        """
        buffers = self._buffers
        if result.form == self.form:
            self._write_bytes(row, result.row)
        else:
            # Of another engine or version: only what every engine means by the same name. Fields
            # that SGLang reads for requests with logprobs must not be those of the row's last user.
            for pointer, size in zip(self._pointers, self._item_bytes, strict=True):
                ctypes.memset(pointer + row * size, 0, size)
            buffers.output_ids[row, 0] = result.first_token
            buffers.cached_tokens[row, 0] = result.cached_tokens
        buffers.bootstrap_room[row, 0] = room

    def _write_bytes(self, row: int, data: bytes) -> None:
        if len(data) != sum(self._item_bytes):
            raise RemoteProtocolError(
                f"a metadata row of {len(data)} bytes, expected {sum(self._item_bytes)}"
            )
        room = self._buffers.bootstrap_room.data_ptr()
        at = 0
        for pointer, size in zip(self._pointers, self._item_bytes, strict=True):
            if pointer != room:
                ctypes.memmove(pointer + row * size, data[at : at + size], size)
            at += size
