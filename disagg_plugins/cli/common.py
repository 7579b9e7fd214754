"""What several subcommands share: argument types and reading the policy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.policy_file import LoadedPolicy


def positive_int(text: str) -> int:
    """Return a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def add_policy(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the policy file as a positional argument."""
    parser.add_argument(
        "policy",
        type=Path,
        nargs="?" if optional else None,
        metavar="POLICY",
        help="the policy file (disagg.yaml)",
    )


def read_policy(path: Path) -> LoadedPolicy:
    """Return the policy, after printing what in it is likely not meant to standard error.

    Raises:
        ConfigError: The file cannot be read or is wrong.
    """
    from disagg_plugins.policy_file import read_policy as read

    loaded = read(path.expanduser())
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    return loaded


def say(line: str) -> None:
    """Print one line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)
