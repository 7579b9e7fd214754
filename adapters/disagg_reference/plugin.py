"""What this adapter offers to the core. Importing this module imports no torch."""

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
    """Offer what the gateway speaks to the reference engine."""
    from disagg_reference.dialect import ReferenceDialect

    return [ReferenceDialect()]


@hookimpl
def disagg_register_launchers() -> Sequence[Launcher]:
    """Offer the way to start a server of the reference engine."""
    from disagg_reference.launcher import ReferenceLauncher

    return [ReferenceLauncher()]


@hookimpl
def disagg_register_checks() -> Sequence[Check]:
    """Offer the questions that ``disagg doctor`` asks about the reference engine."""
    from disagg_reference.checks import ReferenceCheck

    return [ReferenceCheck()]
