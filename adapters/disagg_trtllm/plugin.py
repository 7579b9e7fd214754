"""What this adapter offers to the core. Importing this module imports neither torch nor the engine.

Written against the published interface, exercised on a host that follows it, not run on
TensorRT-LLM here.
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
    """Offer what the gateway speaks to TensorRT-LLM."""
    from disagg_trtllm.dialect import TrtllmDialect
    from disagg_trtllm.native import NativeTrtllmDialect

    return [TrtllmDialect(), NativeTrtllmDialect()]


@hookimpl
def disagg_register_checks() -> Sequence[Check]:
    """Offer the questions that ``disagg doctor`` asks about TensorRT-LLM."""
    from disagg_trtllm.checks import TrtllmCheck

    return [TrtllmCheck()]


@hookimpl
def disagg_register_launchers() -> Sequence[Launcher]:
    """Offer the way to start ``trtllm-serve``."""
    from disagg_trtllm.dialect import TrtllmDialect
    from disagg_trtllm.launcher import TrtllmLauncher
    from disagg_trtllm.native import NativeTrtllmDialect

    return [TrtllmLauncher(TrtllmDialect.engine), TrtllmLauncher(NativeTrtllmDialect.engine)]
