"""Moves KV between two processes of one host: the reader reads the publisher's staging memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_kv_shm.transport import ShmTransport

__all__ = ["ShmTransport"]


def __getattr__(name: str) -> object:
    """Import the transport when somebody asks: every command loads its plugin, few move KV."""
    if name == "ShmTransport":
        from disagg_kv_shm.transport import ShmTransport

        return ShmTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
