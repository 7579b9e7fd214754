"""The built-in plugins, registered through the same host as everybody else's."""

from __future__ import annotations

import importlib
from functools import partial

from disagg_plugins import __version__
from disagg_plugins.plugin_loading import Candidate

BUILTINS = {
    "capacity": "disagg_plugins.scheduling.capacity:Capacity",
    "least-loaded": "disagg_plugins.scheduling.least_loaded:LeastLoaded",
    "threshold": "disagg_plugins.scheduling.threshold:Threshold",
    "rebalance": "disagg_plugins.scheduling.rebalance:Rebalance",
    "preferred-transport": "disagg_plugins.handoff.choice:PreferredTransport",
    "commands": "disagg_plugins.cli.builtin",
}
"""Plugin name -> ``module:attribute``, or ``module`` where the module is the plugin."""


def builtin_candidates() -> list[Candidate]:
    """Return the built-in plugins in the order in which they are asked."""
    return [
        Candidate(name, "built-in", __version__, True, partial(_load, target))
        for name, target in BUILTINS.items()
    ]


def _load(target: str) -> object:
    module, _, attribute = target.partition(":")
    loaded: object = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
