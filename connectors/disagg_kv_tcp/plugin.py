"""Offers the ``tcp`` transport to the plugin host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.handoff.interfaces import Transport


@hookimpl
def disagg_register_transports() -> Sequence[Transport]:
    """Return the transport; it works wherever there are sockets."""
    from disagg_kv_tcp.transport import TcpTransport

    return [TcpTransport()]
