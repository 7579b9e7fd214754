"""Take the better of two workers at random."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping


class PowerOfTwo:
    """Looks at two of the scored workers; several gateways do not all run to the same one.

    Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.

    Args:
        seed: Of the choices; None: another one each time.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    @hookimpl
    def disagg_select_worker(self, scored: Mapping[str, float]) -> str | None:
        """See ``hookspecs.disagg_select_worker``."""
        names = list(scored)
        if len(names) < 2:
            return names[0] if names else None
        return max(self._random.sample(names, 2), key=scored.__getitem__)
