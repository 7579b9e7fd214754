"""A tester's way to one arm: a header that names the arm and proves where it comes from (pure).

``x-disagg-arm: ARM EXPIRES PROOF``: the arm, the second since 1970 at which it ends, and
``HMAC-SHA256(key, canary, arm, expires)`` in hexadecimal, under a key of its own that is derived
from the fleet's secret. It is a password of few words for a bounded time: it may be used as often
as one likes, for the one canary that it was made for.
"""

from __future__ import annotations

from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.errors import AuthenticationError, LocalProtocolError
from disagg_plugins.handoff.keys import DIGEST_BYTES, Purpose, derive_key, equal, sign

OVERRIDE_HEADER = "x-disagg-arm"
"""No worker gets to see it."""

MOST_CHARS = 128
"""Of the header: the longest that is minted has 90."""

MOST_VALID_S = 30 * 86_400.0
"""A tester needs no longer, and what leaks ends some day."""


class MintedBy:
    """Makes and knows the proofs of one canary.

    Args:
        secret: The fleet's secret.
        canary: The canary's name in the policy.

    Raises:
        ConfigError: The secret is too short.
    """

    def __init__(self, secret: bytes, canary: str) -> None:
        self._key = derive_key(secret, Purpose.CANARY)
        self._canary = canary.encode()

    def proof(self, arm: Arm, expires_s: int) -> str:
        """Return the proof of an override."""
        parts = (b"arm", self._canary, arm.encode(), b"%d" % expires_s)
        return sign(self._key, *parts).hex()


def mint_override(minted: MintedBy, arm: Arm, *, now_s: float, valid_s: float) -> str:
    """Return the value of the header, good until ``now_s + valid_s``.

    Raises:
        LocalProtocolError: It would be good for longer than 30 days, or no time at all.
    """
    if not 0.0 < valid_s <= MOST_VALID_S:
        raise LocalProtocolError(f"an override is valid for up to 30 days, not {valid_s!r} s")
    expires_s = int(now_s + valid_s)
    return f"{arm} {expires_s} {minted.proof(arm, expires_s)}"


def read_override(minted: MintedBy, header: str, now_s: float) -> Arm:
    """Return the arm that a header asks for.

    Raises:
        AuthenticationError: It is malformed, false or has ended. The message never repeats it.
    """
    parts = header.split(" ") if len(header) <= MOST_CHARS else []
    if len(parts) != 3:
        raise AuthenticationError(f"{OVERRIDE_HEADER} is not: arm, time, proof")
    name, expires, proof = parts
    arm = next((arm for arm in ARMS if arm == name), None)
    digits = expires.isascii() and expires.isdigit() and len(expires) <= 12
    if arm is None or not digits or len(proof) != 2 * DIGEST_BYTES:
        raise AuthenticationError(f"{OVERRIDE_HEADER} is malformed")
    expected = minted.proof(arm, int(expires)).encode()
    if not equal(proof.encode("utf-8", "surrogatepass"), expected):
        raise AuthenticationError(
            f"{OVERRIDE_HEADER} was not made with this fleet's secret for this canary"
        )
    if now_s >= int(expires):
        raise AuthenticationError(f"{OVERRIDE_HEADER} has ended")
    return arm
