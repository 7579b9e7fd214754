"""A transport that hands KV over in silence and wrong, while a file says so.

It is ``shm``, but for what a reader gets: the first third of each row is zeroed, which is about one
of SmolLM2's three KV heads. Nothing notices on the way; only the answers tell.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disagg_kv_shm.transport import ShmChannel, ShmTransport
from disagg_plugins import hookimpl

SWITCH_ENV = "DAMAGED_KV_SWITCH"
"""Names the file; while it is there, rows are damaged."""


class DamagedChannel(ShmChannel):
    def _shared_rows(self, offset: int, num_bytes: int) -> memoryview:
        rows = super()._shared_rows(offset, num_bytes)
        if not Path(os.environ.get(SWITCH_ENV, "")).is_file():
            return rows
        damaged = bytearray(rows)
        damaged[: num_bytes // 3] = bytes(num_bytes // 3)
        return memoryview(damaged)


class DamagedTransport(ShmTransport):
    name = "damaged"

    def connect(self, *args: Any, **more: Any) -> ShmChannel:
        channel = super().connect(*args, **more)
        channel.__class__ = DamagedChannel
        return channel


@hookimpl
def disagg_register_transports() -> Sequence[ShmTransport]:
    return [DamagedTransport()]
