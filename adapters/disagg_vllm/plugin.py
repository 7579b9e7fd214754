"""What this adapter offers to the core, and how vLLM finds the connector.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.launch.interfaces import Launcher

CONNECTOR = "DisaggConnector"
"""The name that ``--kv-transfer-config`` gives as ``kv_connector``."""

CONNECTOR_MODULE = "disagg_vllm.connector"


@hookimpl
def disagg_register_dialects() -> Sequence[Dialect]:
    """Offer what the gateway speaks to vLLM."""
    from disagg_vllm.dialect import VllmDialect

    return [VllmDialect()]


@hookimpl
def disagg_register_launchers() -> Sequence[Launcher]:
    """Offer the way to start a vLLM server."""
    from disagg_vllm.launcher import VllmLauncher

    return [VllmLauncher()]


@hookimpl
def disagg_register_checks() -> Sequence[Check]:
    """Offer the questions that ``disagg doctor`` asks about vLLM."""
    from disagg_vllm.checks import VllmCheck

    return [VllmCheck()]


def register() -> None:
    """Make the connector known to vLLM; the entry point of ``vllm.general_plugins``.

    vLLM calls this in each of its processes, perhaps more than once, and its factory refuses a
    second registration of a name.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
