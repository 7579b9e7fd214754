"""The files of the canary's page, as they stand in the package."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files

KINDS: Mapping[str, bytes] = {
    "index.html": b"text/html; charset=utf-8",
    "page.css": b"text/css; charset=utf-8",
    "page.js": b"text/javascript; charset=utf-8",
    "uplot.css": b"text/css; charset=utf-8",
    "uplot.js": b"text/javascript; charset=utf-8",
    "uplot.LICENSE": b"text/plain; charset=utf-8",
}
"""Every file there is: what is asked for by another name does not exist. ``uplot.*`` are uPlot
1.6.32 as published (MIT)."""


def static(name: str) -> tuple[bytes, bytes] | None:
    """Return the content type and the body of a file, or None."""
    kind = KINDS.get(name)
    return None if kind is None else (kind, read(name))


@functools.cache
def read(name: str) -> bytes:
    """Return the content of a file of ``KINDS``."""
    return (files("disagg_plugins.canary") / "page" / name).read_bytes()
