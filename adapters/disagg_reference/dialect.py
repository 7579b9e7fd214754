"""How the gateway speaks to the reference engine: as to vLLM. Imports no engine."""

from __future__ import annotations

from disagg_plugins.gateway.relay_dialect import RelayDialect


class ReferenceDialect(RelayDialect):
    """The reference engine with ``--policy``."""

    engine = "reference"
    remedy = "start the worker with --policy"
