"""Moves KV between hosts over TCP, on blocking sockets."""

from disagg_kv_tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
