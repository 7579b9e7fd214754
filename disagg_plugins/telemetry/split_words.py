"""How splits of which no KV was seen to load, and need not be, are told beside the others."""

from __future__ import annotations

from collections.abc import Mapping

WORDS = {"unobserved": "unobserved", "ended_by_prefill": "ended by prefill"}
"""The keys of a count of splits that are neither good nor bad, and what people are told."""


def beside_happened(split: Mapping[str, int]) -> str:
    """Return what stands behind "39 of 40 happened", beginning with a comma; "" for nothing."""
    return "".join(f", {split[key]} {said}" for key, said in WORDS.items() if split.get(key))
