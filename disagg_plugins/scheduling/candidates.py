"""A bounded look at a large fleet, so that a decision does not cost more in it."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.types import Worker


class Candidates:
    """Takes a few workers at even distances, from another start each time.

    Args:
        bound: Workers to take at most.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._turn = count()

    def of(self, workers: Sequence[Worker]) -> Sequence[Worker]:
        """Return ``workers``, or ``bound`` of them."""
        total = len(workers)
        if total <= self.bound:
            return workers
        start, stride = next(self._turn), total // self.bound
        return [workers[(start + i * stride) % total] for i in range(self.bound)]
