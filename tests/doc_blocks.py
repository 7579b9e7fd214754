"""The fenced blocks of a Markdown file, as the tests of the documentation use them.

The word after the language says what a block is for: ``run`` is executed, in order; ``gpu`` is the
same command for a machine with GPUs; ``save=NAME`` is a file that the reader saves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "migration_guides").glob("*.md")),
)
FENCE = re.compile(r"^```(?P<language>\w+)(?P<use>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language, the word after it, its text and its 1-based line."""

    language: str
    use: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page that name a language, in order."""
    content = page.read_text()
    return [
        Block(
            found["language"],
            found["use"].strip(),
            found["text"],
            content.count("\n", 0, found.start()) + 1,
        )
        for found in FENCE.finditer(content)
    ]


def commands(block: Block) -> list[str]:
    """Return the lines of a shell block, continued lines joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [line.split(" # ")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
