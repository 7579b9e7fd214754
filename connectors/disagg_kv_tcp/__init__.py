"""Moves KV between hosts over TCP, on blocking sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_kv_tcp.transport import TcpTransport

__all__ = ["TcpTransport"]


def __getattr__(name: str) -> object:
    """Import the transport when somebody asks: every command loads its plugin, few move KV."""
    if name == "TcpTransport":
        from disagg_kv_tcp.transport import TcpTransport

        return TcpTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
