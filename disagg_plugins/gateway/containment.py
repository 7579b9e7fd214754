"""What keeps a fault in one request from all others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Abandons(Protocol):
    """Something that can end by itself."""

    def abandon(self, exc: Exception) -> None:
        """End, whatever state it is in."""
        ...


P = ParamSpec("P")
T = TypeVar("T", bound=Abandons)


def contained(method: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """Make a way into an object safe: whatever fails inside ends this object and no other."""

    @functools.wraps(method)
    def safe(self: T, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as exc:
            self.abandon(exc)

    return safe
