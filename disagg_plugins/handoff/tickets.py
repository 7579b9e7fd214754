"""The ticket: the small signed record that lets the decode side claim one handoff.

``base64url(HMAC-SHA256 || msgpack)``, at most 1 KiB of text. The gateway mints it, it travels in
the HTTP requests, and the prefill side verifies it twice: before it stages anything and when a
peer claims. Whoever holds a ticket still needs the shared secret to open a channel.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets

import msgspec

from disagg_plugins.errors import AuthenticationError, LocalProtocolError
from disagg_plugins.handoff.keys import DIGEST_BYTES, Purpose, derive_key, equal, sign
from disagg_plugins.types import HandoffId

MAX_TICKET_CHARS = 1024
MAX_NAME_CHARS = 64
CLOCK_SKEW_S = 30.0
"""How far two hosts' clocks may differ before a fresh ticket looks like one from the future."""

_HANDOFF_ID = re.compile(r"[0-9a-f]{32}")


class Ticket(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who hands what to whom, and until when.

    Attributes:
        handoff_id: 32 lower-case hexadecimal digits.
        prefill: Name of the prefill worker.
        decode: Name of the decode worker.
        issued_s: Wall-clock time of minting, in seconds since the epoch.
        expires_s: Wall-clock time after which the ticket is void.
    """

    handoff_id: str
    prefill: str
    decode: str
    issued_s: float
    expires_s: float


def new_handoff_id() -> HandoffId:
    """Return 128 random bits as 32 lower-case hexadecimal digits."""
    return HandoffId(secrets.token_hex(16))


def mint(
    secret: bytes,
    *,
    handoff_id: str,
    prefill: str,
    decode: str,
    now_s: float,
    valid_s: float,
) -> str:
    """Return the text of a signed ticket that is valid for ``valid_s`` from ``now_s`` on.

    Raises:
        LocalProtocolError: The id is malformed or a name is longer than 64 characters.
    """
    ticket = Ticket(handoff_id, prefill, decode, now_s, now_s + valid_s)
    problem = _problem(ticket)
    if problem is not None:
        raise LocalProtocolError(f"cannot mint a ticket: {problem}")
    body = msgspec.msgpack.encode(ticket)
    proof = sign(derive_key(secret, Purpose.TICKET), body)
    return base64.urlsafe_b64encode(proof + body).decode("ascii").rstrip("=")


def verify(secret: bytes, text: str, now_s: float) -> Ticket:
    """Return the ticket in ``text`` if it is genuine and still valid at ``now_s``.

    Raises:
        AuthenticationError: Too long, malformed, signed with another secret, or expired. The
            message never repeats the ticket.
    """
    if not 0 < len(text) <= MAX_TICKET_CHARS:
        raise AuthenticationError(f"a ticket is a text of 1 to {MAX_TICKET_CHARS} characters")
    try:
        raw = base64.b64decode(
            text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise AuthenticationError("the ticket is not base64url") from exc
    proof, body = raw[:DIGEST_BYTES], raw[DIGEST_BYTES:]
    if not equal(proof, sign(derive_key(secret, Purpose.TICKET), body)):
        raise AuthenticationError(
            "the ticket was not signed with this fleet's secret; "
            "check that gateway and workers share one secret"
        )
    try:
        ticket = msgspec.msgpack.decode(body, type=Ticket)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise AuthenticationError("the ticket is signed but malformed") from exc
    problem = _problem(ticket)
    if problem is not None:
        raise AuthenticationError(f"the ticket is signed but malformed: {problem}")
    check_valid_at(ticket, now_s)
    return ticket


def peek_handoff_id(text: str) -> str:
    """Return the handoff id in ``text`` without verifying anything, for error messages only."""
    try:
        raw = base64.urlsafe_b64decode(text[:MAX_TICKET_CHARS].encode("ascii") + b"==")
        ticket = msgspec.msgpack.decode(raw[DIGEST_BYTES:], type=Ticket)
    except (UnicodeError, binascii.Error, msgspec.DecodeError):
        return "unknown"
    return "unknown" if _problem(ticket) else ticket.handoff_id


def check_valid_at(ticket: Ticket, now_s: float) -> None:
    """Raise unless ``ticket`` is valid at ``now_s``.

    Raises:
        AuthenticationError: Expired, or issued in the future by more than the clock skew.
    """
    if now_s >= ticket.expires_s:
        raise AuthenticationError(
            f"the ticket of handoff {ticket.handoff_id} expired {now_s - ticket.expires_s:.1f} s "
            "ago; raise handoff.ticket_s or check the hosts' clocks"
        )
    if ticket.issued_s > now_s + CLOCK_SKEW_S:
        raise AuthenticationError(
            f"the ticket of handoff {ticket.handoff_id} was issued "
            f"{ticket.issued_s - now_s:.1f} s in the future; check the hosts' clocks"
        )


def _problem(ticket: Ticket) -> str | None:
    if not _HANDOFF_ID.fullmatch(ticket.handoff_id):
        return "the handoff id is not 32 lower-case hexadecimal digits"
    for name in (ticket.prefill, ticket.decode):
        if len(name) > MAX_NAME_CHARS:
            return f"a worker name has {len(name)} characters, at most {MAX_NAME_CHARS} are allowed"
    return None
