"""What this adapter offers to the core, and how SGLang finds the transfer backend.

Importing this module imports neither SGLang nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.launch.interfaces import Launcher


@hookimpl
def disagg_register_dialects() -> Sequence[Dialect]:
    """Offer what the gateway speaks to SGLang."""
    from disagg_sglang.dialect import SglangDialect

    return [SglangDialect()]


@hookimpl
def disagg_register_launchers() -> Sequence[Launcher]:
    """Offer the way to start an SGLang server."""
    from disagg_sglang.launcher import SglangLauncher

    return [SglangLauncher()]


@hookimpl
def disagg_register_checks() -> Sequence[Check]:
    """Offer the questions that ``disagg doctor`` asks about SGLang."""
    from disagg_sglang.checks import SglangCheck

    return [SglangCheck()]


def register() -> None:
    """Make the transfer backend known to SGLang; the entry point of ``sglang.srt.plugins``.

    SGLang calls this once in each of its processes.
    """
    from disagg_sglang.patches import register as register_backend

    register_backend()
