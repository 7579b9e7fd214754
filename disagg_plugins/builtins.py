"""The built-in plugins, registered through the same host as everybody else's."""

from __future__ import annotations

import importlib
from functools import partial

from disagg_plugins import __version__
from disagg_plugins.plugin_loading import Candidate

BUILTINS = {
    "capacity": "disagg_plugins.scheduling.capacity:Capacity",
    "labels": "disagg_plugins.scheduling.labels:Labels",
    "least-loaded": "disagg_plugins.scheduling.least_loaded:LeastLoaded",
    "prefix-affinity": "disagg_plugins.scheduling.prefix_affinity:PrefixAffinity",
    "outstanding-tokens": "disagg_plugins.scheduling.outstanding_tokens:OutstandingTokens",
    "kv-room": "disagg_plugins.scheduling.kv_room:KvRoom",
    "transfer-cost": "disagg_plugins.scheduling.transfer_cost:TransferCost",
    "session-affinity": "disagg_plugins.scheduling.session_affinity:SessionAffinity",
    "power-of-two": "disagg_plugins.scheduling.power_of_two:PowerOfTwo",
    "weighted-random": "disagg_plugins.scheduling.weighted_random:WeightedRandom",
    "threshold": "disagg_plugins.scheduling.threshold:Threshold",
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
