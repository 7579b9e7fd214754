"""Which build of this package runs: its plain sources, or some of them compiled."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

BuildKind = Literal["compiled", "pure Python"]


def build_kind() -> BuildKind:
    """Return which build this is; all modules that can be compiled are, or none is."""
    spec = find_spec("disagg_plugins.scheduling.decision")
    plain = spec is None or spec.origin is None or spec.origin.endswith(".py")
    return "pure Python" if plain else "compiled"
