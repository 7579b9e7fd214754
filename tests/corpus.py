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


def fixed_corpus() -> str:
    """Return a text that never changes: the sources of gguf 0.19.0, which `make model` brings.

    For what depends on the very prompts: the project's own files change with every commit.
    """
    files = sorted((ROOT / ".models" / "source" / "gguf").rglob("*.py"))
    return "\n\n".join(path.read_text() for path in files)


def prompts(lengths_tokens: list[int], *, seed: int, text: str | None = None) -> Iterator[str]:
    """Yield one prompt of about each length, each from its own place of ``text``, or the corpus."""
    text, source = text or corpus(), random.Random(seed)
    for tokens in lengths_tokens:
        chars = int(tokens * CHARS_PER_TOKEN)
        start = source.randrange(len(text) - chars)
        yield text[start : start + chars]
