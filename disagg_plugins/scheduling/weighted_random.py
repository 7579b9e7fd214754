"""Take a worker at random, by its score."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping


class WeightedRandom:
    """A worker of twice the score gets twice the requests.

    Args:
        seed: Of the choices; None: another one each time.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    @hookimpl
    def disagg_select_worker(self, scored: Mapping[str, float]) -> str | None:
        """See ``hookspecs.disagg_select_worker``."""
        if not scored:
            return None
        names, weights = list(scored), list(scored.values())
        if not any(weights):
            return self._random.choice(names)
        return self._random.choices(names, weights)[0]
