"""The built-in plugins, registered through the same host as everybody else's."""

from __future__ import annotations

import importlib
from functools import partial

from disagg_plugins import __version__
from disagg_plugins.plugin_loading import Candidate
from disagg_plugins.scheduling.prediction import Predictor
from disagg_plugins.scheduling.uses_predictor import UsesPredictor

BUILTINS = {
    "capacity": "disagg_plugins.scheduling.capacity:Capacity",
    "slo-admission": "disagg_plugins.scheduling.slo_admission:SloAdmission",
    "prefill-slots": "disagg_plugins.scheduling.prefill_slots:PrefillSlots",
    "labels": "disagg_plugins.scheduling.labels:Labels",
    "least-loaded": "disagg_plugins.scheduling.least_loaded:LeastLoaded",
    "prediction": "disagg_plugins.scheduling.learning:Learning",
    "prefix-affinity": "disagg_plugins.scheduling.prefix_affinity:PrefixAffinity",
    "outstanding-tokens": "disagg_plugins.scheduling.outstanding_tokens:OutstandingTokens",
    "kv-room": "disagg_plugins.scheduling.kv_room:KvRoom",
    "transfer-cost": "disagg_plugins.scheduling.transfer_cost:TransferCost",
    "predicted-time": "disagg_plugins.scheduling.predicted_time:PredictedTime",
    "session-affinity": "disagg_plugins.scheduling.session_affinity:SessionAffinity",
    "power-of-two": "disagg_plugins.scheduling.power_of_two:PowerOfTwo",
    "weighted-random": "disagg_plugins.scheduling.weighted_random:WeightedRandom",
    "threshold": "disagg_plugins.scheduling.threshold:Threshold",
    "rebalance": "disagg_plugins.scheduling.rebalance:Rebalance",
    "always": "disagg_plugins.scheduling.always:Always",
    "never": "disagg_plugins.scheduling.never:Never",
    "load": "disagg_plugins.scheduling.load_rule:LoadRule",
    "slo": "disagg_plugins.scheduling.slo:Slo",
    "preferred-transport": "disagg_plugins.handoff.choice:PreferredTransport",
    "commands": "disagg_plugins.cli.builtin",
}
"""Plugin name -> ``module:attribute``, or ``module`` where the module is the plugin."""


def builtin_candidates() -> list[Candidate]:
    """Return the built-in plugins in the order in which they are asked.

    Those of one call share one ``Predictor``: what one learns, the others decide by.
    """
    predictor = Predictor()
    return [
        Candidate(name, "built-in", __version__, True, partial(_load, target, predictor))
        for name, target in BUILTINS.items()
    ]


def _load(target: str, predictor: Predictor) -> object:
    module, _, attribute = target.partition(":")
    loaded: object = importlib.import_module(module)
    if not attribute:
        return loaded
    loaded = getattr(loaded, attribute)
    if isinstance(loaded, type) and issubclass(loaded, UsesPredictor):
        return loaded(predictor)
    return loaded
