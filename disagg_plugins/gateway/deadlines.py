"""When the waits of one request end: for its workers, and for all of it (sans-IO)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.wire import header_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.policy import GatewayPolicy

Wait = Literal["prefill", "first_byte", "idle"]

FOREVER = float("inf")

LEFT_S = 1.0
"""How long the worker of a client that left with its whole answer may take to end its own; then
its connection is closed instead of kept."""

TIMEOUT_HEADER = b"x-disagg-timeout"
"""Seconds that the client waits for the whole answer, from when its request has arrived."""

_SECONDS = re.compile(rb"\d{1,7}(\.\d{1,9})?")


def timeout_of(headers: Sequence[Header], bound_s: float | None) -> float | None:
    """Return how long a request may take in seconds, or None: as long as it likes.

    Args:
        headers: Of the request; a client may ask for less than the bound.
        bound_s: The policy's ``gateway.request_s``.

    Raises:
        RequestError: 400; the header is no positive number of seconds.
    """
    given = header_value(headers, TIMEOUT_HEADER)
    if given is None:
        return bound_s
    asked_s = float(given) if _SECONDS.fullmatch(given.strip()) else 0.0
    if asked_s <= 0.0:
        shown = given[:32].decode("ascii", "replace")
        raise RequestError(
            400,
            f"the header x-disagg-timeout is {shown!r}; it takes seconds, such as 12.5",
            code="invalid_timeout",
        )
    return asked_s if bound_s is None else min(asked_s, bound_s)


class Deadlines:
    """The ends of one request's waits, in seconds on the monotonic clock; ``FOREVER``: none.

    Args:
        policy: How long each wait may be.
        arrival_s: When the request came.
        request_s: When its client stops waiting; None: never.

    Attributes:
        prefill_s: Of the prefill worker's answer.
        decode_s: Of the next bytes of the answer; or of a client that stopped reading them.
        request_s: Of the request.
        hedge_s: When another worker is asked too, if no answer has begun.
    """

    __slots__ = ("_policy", "decode_s", "hedge_s", "prefill_s", "request_s")

    def __init__(self, policy: GatewayPolicy, arrival_s: float, request_s: float | None) -> None:
        self._policy = policy
        self.prefill_s = self.decode_s = FOREVER
        self.request_s = FOREVER if request_s is None else request_s
        self.hedge_s = FOREVER if policy.hedge_s is None else arrival_s + policy.hedge_s

    def passed(self, now_s: float) -> bool:
        """Return whether one of them has passed."""
        return (
            now_s > self.decode_s
            or now_s > self.prefill_s
            or now_s > self.request_s
            or now_s > self.hedge_s
        )

    def sent(self, side: str, now_s: float) -> None:
        """A call was made."""
        if side == "prefill":
            self.prefill_s = now_s + self._policy.prefill_s
        else:
            self.decode_s = now_s + self._policy.first_byte_s

    def heard(self, now_s: float, *, begun: bool) -> None:
        """Bytes of the answer came, which has ``begun`` for the client or not."""
        self.decode_s = now_s + (self._policy.idle_s if begun else self._policy.first_byte_s)

    def late(self, wait: Wait) -> str:
        """Return what is to be said of a wait that lasted too long."""
        bound_s = getattr(self._policy, f"{wait}_s")
        what = "nothing more" if wait == "idle" else "no answer"
        return f"{what} within {bound_s:g} s (policy key gateway.{wait}_s)"

    def left(self, now_s: float) -> None:
        """The client left with its whole answer: only its worker has yet to end."""
        self.decode_s, self.request_s = now_s + LEFT_S, FOREVER

    def over(self) -> None:
        """Nothing is waited for any more."""
        self.prefill_s = self.decode_s = self.request_s = self.hedge_s = FOREVER
