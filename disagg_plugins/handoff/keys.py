"""Sub-keys of the fleet's shared secret, one for each purpose.

A proof made for one purpose is worthless for another, because each purpose signs with a key of
its own: ``HMAC-SHA256(secret, "disagg-plugins/v1/" + purpose)``.
"""

from __future__ import annotations

import functools
import hmac
from enum import StrEnum

from disagg_plugins.errors import ConfigError

MIN_SECRET_BYTES = 16
"""As the policy demands; below this, guessing becomes thinkable."""

DIGEST_BYTES = 32
"""Bytes of one HMAC-SHA256."""


class Purpose(StrEnum):
    """What a sub-key signs."""

    TICKET = "ticket"
    HANDSHAKE = "handshake"
    REPORT = "report"
    ADMIN = "admin"
    CANARY = "canary"


@functools.lru_cache(maxsize=64)
def derive_key(secret: bytes, purpose: Purpose) -> bytes:
    """Return the 32-byte sub-key of ``secret`` for ``purpose``; the last few are remembered.

    Raises:
        ConfigError: The secret is shorter than 16 bytes.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the shared secret has {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed",
            key="secret",
            fix="use 32 random bytes, for example from `openssl rand -hex 32`",
        )
    return sign(secret, b"disagg-plugins/v1/" + purpose.value.encode())


def sign(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC-SHA256 of ``parts``, each preceded by its length so that none can shift."""
    message = b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "big"), part)])
    return hmac.digest(key, message, "sha256")  # in C at one go: a third of what hmac.new costs


def equal(a: bytes, b: bytes) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(a, b)
