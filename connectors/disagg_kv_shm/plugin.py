"""Offers the ``shm`` transport to the plugin host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.handoff.interfaces import Transport


@hookimpl
def disagg_register_transports() -> Sequence[Transport]:
    """Return the transport where the kernel has memfd and abstract sockets; else nothing."""
    from disagg_kv_shm.transport import ShmTransport, available

    return [ShmTransport()] if available() else []
