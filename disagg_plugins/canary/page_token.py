"""Tokens that open the canary's page to a browser, for a time (pure).

A browser cannot sign requests with the fleet's secret. Who has the secret makes a link with a token
instead, bound to one canary, one right and one end; the page sends it as a bearer
token, which no other site can make a browser do.
"""

from __future__ import annotations

from typing import Literal

from disagg_plugins.errors import AuthenticationError, LocalProtocolError
from disagg_plugins.handoff.keys import DIGEST_BYTES, Purpose, derive_key, equal, sign

Right = Literal["see", "act"]
RIGHTS: tuple[Right, ...] = ("see", "act")

MOST_VALID_S = 30 * 86_400.0
"""What leaks ends some day."""

MOST_CHARS = 128


class Tokens:
    """Makes and reads the tokens of one canary.

    Args:
        secret: The fleet's secret.
        canary: The canary's name.

    Raises:
        ConfigError: The secret is too short.
    """

    def __init__(self, secret: bytes, canary: str) -> None:
        self._key = derive_key(secret, Purpose.CANARY)
        self._canary = canary.encode()

    def mint(self, right: Right, now_s: float, valid_s: float) -> str:
        """Return a token that is good until ``now_s + valid_s``.

        Raises:
            LocalProtocolError: It would be good for longer than 30 days, or no time at all.
        """
        if not 0.0 < valid_s <= MOST_VALID_S:
            raise LocalProtocolError(f"a token is valid for up to 30 days, not {valid_s!r} s")
        expires_s = int(now_s + valid_s)
        return f"{right}.{expires_s}.{self._proof(right, expires_s)}"

    def read(self, token: str, now_s: float) -> Right:
        """Return what a token allows.

        Raises:
            AuthenticationError: It is malformed, false or has ended. The message never repeats it.
        """
        parts = token.split(".") if len(token) <= MOST_CHARS else []
        right = next((right for right in RIGHTS if parts and right == parts[0]), None)
        digits = len(parts) == 3 and parts[1].isascii() and parts[1].isdigit()
        if right is None or not digits or len(parts[1]) > 12 or len(parts[2]) != 2 * DIGEST_BYTES:
            raise AuthenticationError("the token is malformed")
        expires_s = int(parts[1])
        expected = self._proof(right, expires_s).encode()
        if not equal(parts[2].encode("utf-8", "surrogatepass"), expected):
            raise AuthenticationError("the token was not made with this fleet's secret")
        if now_s >= expires_s:
            raise AuthenticationError("the token has ended: make a new link")
        return right

    def _proof(self, right: Right, expires_s: int) -> str:
        parts = (b"page", self._canary, right.encode(), b"%d" % expires_s)
        return sign(self._key, *parts).hex()
