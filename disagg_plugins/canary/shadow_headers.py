"""Which headers of a request its copy carries: only those on a list, and never a secret (pure).

A copy goes where its client did not send it, perhaps to other hardware or another company's log. So
nothing is passed on that the operator has not named, and what carries secrets cannot be named. The
client's ``authorization`` is dropped; where the arms' workers want one, the operator gives the
copies one of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from disagg_plugins.credentials import looks_like_a_secret
from disagg_plugins.errors import ConfigError

SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie"})

FRAMING_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""The gateway frames a copy itself."""

MOST_VALUE_CHARS = 4096


class ShadowHeaders:
    """The headers of copies.

    Args:
        passed: Names of those that are passed on.
        authorization: What copies carry as ``authorization``; None: nothing.

    Raises:
        ConfigError: A name carries secrets, or is the gateway's own to write.
    """

    def __init__(self, passed: Collection[str] = (), authorization: str | None = None) -> None:
        names = frozenset(name.lower() for name in passed)
        for name in sorted(names):
            if why := why_not_passed(name):
                raise ConfigError(f"{name} {why}", key="canary.shadow.headers")
        self._passed = names
        self._authorization = authorization

    def of(self, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return those of a copy.

        Args:
            headers: Of the request, by names in lower case.
        """
        found = [
            (name, value)
            for name, value in headers.items()
            if name in self._passed and len(value) <= MOST_VALUE_CHARS
        ]
        if self._authorization is not None:
            found.append(("authorization", self._authorization))
        return found


def why_not_passed(name: str) -> str | None:
    """Return why a header can be on no list, or None."""
    if name in SECRET_HEADERS or looks_like_a_secret(name):
        return "carries secrets, which are never passed on"
    if name in FRAMING_HEADERS or name.startswith("x-disagg-") or name == "x-request-id":
        return "is written by the gateway itself"
    return None
