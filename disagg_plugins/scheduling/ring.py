"""Consistent hashing of names onto workers (pure)."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.types import Worker

POINTS = 32
"""Of each worker on the ring: the share of the busiest is then about 1.4 times the mean."""

MAX_POINTS = 8192
"""Of a ring where there is a choice; they take about 10 ms to make, on the event loop."""

MAX_STEPS = 4096
"""Points passed in search of a worker that will do: in a fleet of 128 all, else a good part."""


class Ring:
    """Workers at points of a ring; a name belongs to the first worker behind it.

    Attributes:
        workers: What the ring was made of.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        points = sorted(
            (_point(f"{number}\0{worker.name}"), index)
            for index, worker in enumerate(workers)
            for number in range(_points_each(len(workers)))
        )
        self._points = [point for point, _ in points]
        self._owners = [index for _, index in points]

    def walk(self, name: str) -> Iterator[Worker]:
        """Yield the workers that a name belongs to, the first before those that stand in for it.

        One may come more than once.
        """
        owners, start = self._owners, bisect(self._points, _point(name))
        for step in range(min(len(owners), MAX_STEPS)):
            yield self.workers[owners[(start + step) % len(owners)]]


def _points_each(workers: int) -> int:
    """Return the points of each worker: fewer in a large fleet, a power of two.

    Half of the points stay where they are when a growing fleet passes such a bound.
    """
    each = POINTS
    while each > 1 and each * workers > MAX_POINTS:
        each //= 2
    return each


def _point(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
