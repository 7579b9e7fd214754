"""What the gateway tells both SGLang workers of a handoff, packed into ``bootstrap_host``.

SGLang hands a request's ``bootstrap_host``, ``bootstrap_port`` and ``bootstrap_room`` to the
transfer backend and looks at none of them. This project's backend meets through the policy's
transports and not through a bootstrap server, so the host carries the ticket and, for decode,
where the prefill worker serves KV. Imports no engine.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated

import msgspec

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.handoff.endpoints import from_json

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Endpoint

PREFIX = "disagg1-"
"""Names the format. No host name of SGLang's own looks like it."""

MAX_HOST_CHARS = 128 * 1024
"""A worker of 256 ranks takes 74 000: host id, a name for shm and an IPv6 address for each."""

MAX_TICKET_CHARS = 1024


class Room(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One worker's part of a handoff.

    Attributes:
        ticket: The gateway's signed record.
        endpoints: Where each prefill rank serves KV, as ``handoff.endpoints`` writes them; empty
            for prefill.
        first_token: The token that prefill sampled, where the publisher does not tell it along
            with the KV; -1 where it does.
    """

    ticket: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TICKET_CHARS)]
    endpoints: Annotated[list[dict[str, object]], msgspec.Meta(max_length=256)] = []
    first_token: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)] = -1

    def parsed_endpoints(self) -> tuple[Endpoint, ...]:
        """Return the endpoints, checked.

        Raises:
            RemoteProtocolError: They are malformed, or not one for each rank.
        """
        return from_json(list(self.endpoints))


def pack_room(room: Room) -> str:
    """Return ``room`` as the value of ``bootstrap_host``: letters, digits, ``-``, ``_``."""
    text = base64.urlsafe_b64encode(msgspec.json.encode(room)).decode("ascii")
    return PREFIX + text.rstrip("=")


def unpack_room(host: str | None) -> Room:
    """Return what ``pack_room`` packed.

    Args:
        host: ``bootstrap_host`` of a request, with or without ``:port`` behind it.

    Raises:
        RemoteProtocolError: It is something else, too long or malformed.
    """
    text = (host or "").partition(":")[0]
    if not text.startswith(PREFIX):
        raise RemoteProtocolError(
            f"bootstrap_host is {text[:80]!r}: the request does not come from this project's "
            "gateway; send requests to the gateway, or start SGLang with another "
            "--disaggregation-transfer-backend"
        )
    if len(text) > MAX_HOST_CHARS:
        raise RemoteProtocolError(
            f"bootstrap_host of {len(text)} characters, at most {MAX_HOST_CHARS}"
        )
    body = text.removeprefix(PREFIX)
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(packed, type=Room)
    except (binascii.Error, ValueError, RecursionError, msgspec.DecodeError) as exc:
        raise RemoteProtocolError(f"bootstrap_host is malformed: {exc}") from exc
