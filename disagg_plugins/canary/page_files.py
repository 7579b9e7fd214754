"""The files of the canary's page, as they stand in the package."""

from __future__ import annotations


def static(name: str) -> tuple[bytes, bytes] | None:
    """Return the content type and the body of a file, or None."""
    return None
