"""Endpoints as JSON, and the identity of the host.

Endpoints arrive inside HTTP bodies, so they are untrusted: every length is bounded and every
type checked. An endpoint names a socket to connect to; what protects against being sent to a
stranger is the mutual proof of the secret in the handshake, before which a channel tells the
peer nothing but random numbers.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Annotated

import msgspec

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.handoff.interfaces import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_ENDPOINTS = 256
"""Ranks of one worker; the largest tensor-parallel groups in use have 64."""

MAX_ENDPOINTS_CHARS = 64 * 1024
MAX_ADDRESS_CHARS = 256

_Rank = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ENDPOINTS)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_ENDPOINTS)]
_HostId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Transport = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Address = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ADDRESS_CHARS)]


class _EndpointJson(msgspec.Struct, forbid_unknown_fields=True):
    tp_rank: _Rank
    tp_size: _Size
    host_id: _HostId
    addresses: Annotated[dict[_Transport, _Address], msgspec.Meta(min_length=1, max_length=16)]


_Endpoints = Annotated[list[_EndpointJson], msgspec.Meta(min_length=1, max_length=MAX_ENDPOINTS)]


def to_json(endpoints: Sequence[Endpoint]) -> list[dict[str, object]]:
    """Return plain JSON values that ``from_json`` reads back."""
    return [
        {
            "tp_rank": e.tp_rank,
            "tp_size": e.tp_size,
            "host_id": e.host_id,
            "addresses": dict(e.addresses),
        }
        for e in endpoints
    ]


def from_json(value: object) -> tuple[Endpoint, ...]:
    """Return the endpoints in ``value``, one for each rank, ordered by rank.

    Args:
        value: A list as ``to_json`` makes it, or that list as JSON text.

    Raises:
        RemoteProtocolError: Too long, of a wrong type, or not exactly one entry for each rank.
    """
    try:
        if isinstance(value, str | bytes):
            if len(value) > MAX_ENDPOINTS_CHARS:
                raise RemoteProtocolError(
                    f"endpoints of {len(value)} characters, at most {MAX_ENDPOINTS_CHARS}"
                )
            parsed = msgspec.json.decode(value, type=_Endpoints)
        else:
            parsed = msgspec.convert(value, type=_Endpoints)
    except (msgspec.DecodeError, UnicodeError) as exc:
        raise RemoteProtocolError(f"endpoints are malformed: {exc}") from exc
    endpoints = tuple(
        Endpoint(e.tp_rank, e.tp_size, e.host_id, e.addresses)
        for e in sorted(parsed, key=lambda e: e.tp_rank)
    )
    check_complete(endpoints)
    return endpoints


def check_complete(endpoints: Sequence[Endpoint]) -> None:
    """Raise unless ``endpoints`` holds every rank of one worker exactly once, in order.

    Raises:
        RemoteProtocolError: A rank is missing, twice or out of order, or sizes differ.
    """
    ranks = [e.tp_rank for e in endpoints]
    sizes = {e.tp_size for e in endpoints}
    if sizes != {len(endpoints)} or ranks != list(range(len(endpoints))):
        raise RemoteProtocolError(
            f"endpoints of ranks {ranks} with tp_size {sorted(sizes)} do not form one worker"
        )


@functools.cache
def local_host_id() -> str:
    """Return an id that is equal on two processes that can reach each other's abstract sockets.

    The kernel's boot id, joined with the inode of the network namespace, because abstract Unix
    sockets are visible within one network namespace only. Without ``/proc`` the id is unique to
    the process, so that nothing is ever taken for the same host.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return f"process-{os.getpid()}-{os.urandom(8).hex()}"
    return f"{boot}:{namespace}"
