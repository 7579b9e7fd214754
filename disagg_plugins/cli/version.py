"""``disagg version``: what is installed."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from disagg_plugins import __version__
from disagg_plugins.build_kind import build_kind
from disagg_plugins.handoff.layouts import PROTOCOL_VERSION
from disagg_plugins.hookspecs import HOOKSPEC_VERSION

if TYPE_CHECKING:
    import argparse


class VersionCommand:
    """Prints the versions that matter in a bug report."""

    name = "version"
    help = "print the versions of this package, its protocol and its hooks"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Take no arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Print one line."""
        print(
            f"disagg-plugins {__version__}, handoff protocol {PROTOCOL_VERSION}, "
            f"hooks {HOOKSPEC_VERSION}, Python {platform.python_version()}, {build_kind()} build"
        )
        return 0
