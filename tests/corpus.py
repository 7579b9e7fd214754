"""Text for prompts: this project's own files, cut at seeded places."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("disagg_plugins", "adapters", "connectors")
CHARS_PER_TOKEN = 3.0
"""Measured on these files with SmolLM2's tokenizer: 2.6 to 3.4."""


def corpus() -> str:
    """Return the project's licence and sources as one text, in a fixed order."""
    files = [ROOT / "LICENSE"]
    for folder in FOLDERS:
        files += sorted((ROOT / folder).rglob("*.py"))
    return "\n\n".join(path.read_text() for path in files if path.is_file())


def prompts(lengths_tokens: list[int], *, seed: int) -> Iterator[str]:
    """Yield one prompt of about each length, each from its own place of the text."""
    text, source = corpus(), random.Random(seed)
    for tokens in lengths_tokens:
        chars = int(tokens * CHARS_PER_TOKEN)
        start = source.randrange(len(text) - chars)
        yield text[start : start + chars]
