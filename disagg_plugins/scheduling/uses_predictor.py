"""What the built-in plugins that predict have in common: the predictor of their host."""

from __future__ import annotations

from disagg_plugins.scheduling.prediction import Predictor


class UsesPredictor:
    """A built-in plugin that shares the predictor of its host; alone it has one of its own.

    Not beside ``Predictor``: that may be compiled, and no plugin can inherit from a compiled class.
    """

    def __init__(self, predictor: Predictor | None = None) -> None:
        self.predictor = predictor or Predictor()
