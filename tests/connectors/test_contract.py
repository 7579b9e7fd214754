"""Both built-in transports pass the contract."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_kv_tcp.transport import parse_address
from disagg_plugins.testing.connector_contract import ConnectorContract

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Transport


class TestTcp(ConnectorContract):
    def make_transport(self) -> Transport:
        return TcpTransport()

    def raw_connect(self, address: str) -> socket.socket:
        return socket.create_connection(parse_address(address), timeout=5)


class TestShm(ConnectorContract):
    def make_transport(self) -> Transport:
        return ShmTransport()

    def raw_connect(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect("\0" + address[1:])
        return sock
