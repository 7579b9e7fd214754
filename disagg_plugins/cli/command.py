"""What a subcommand of ``disagg`` is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import argparse


class Command(Protocol):
    """One subcommand; offered by ``disagg_register_commands``."""

    name: str
    """The word on the command line."""

    help: str
    """One line for ``disagg --help``."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add this command's arguments; import nothing heavy here."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit code.

        Raises:
            ConfigError: What the operator wrote is wrong; the command exits with 2.
            DisaggError: It did not work; the command exits with 1.
        """
        ...
