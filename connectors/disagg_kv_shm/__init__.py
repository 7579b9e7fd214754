"""Moves KV between two processes of one host: the reader reads the publisher's staging memory."""

from disagg_kv_shm.transport import ShmTransport

__all__ = ["ShmTransport"]
