"""Which worker holds the KV of which beginnings of prompts (pure).

Rules:

- What a worker holds is closed under prefixes: where it holds a piece, it holds all before it.
  So the longest beginning that anybody holds is found without looking at each worker.
- ``put`` makes a prompt's pieces the youngest of all, the first piece youngest; the oldest are
  given up first, so a piece is given up before those that it builds on.
- ``hold`` and ``drop`` are for whoever knows exactly, and keeps the first rule itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

MAX_ENTRIES = 1 << 20
"""Pieces held by all workers together: about 300 MiB when full, 67 million tokens."""

MOST_HOLDERS = 64
"""Workers named for one prompt, the best ones: far more than a scheduler looks at."""

Piece = tuple[str, str]
"""A worker's name and the hash of what it holds."""


class PrefixIndex:
    """Pieces by worker, and workers by piece.

    Args:
        worker_pieces: Bound on the pieces of one worker, where it has no bound of its own.
        ttl_s: How long a piece that was ``put`` is believed, in seconds; None: without end.
        max_entries: Bound on the pieces of all workers.
    """

    def __init__(
        self,
        worker_pieces: int,
        *,
        ttl_s: float | None = None,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self._worker_pieces = worker_pieces
        self._ttl_s = ttl_s
        self._max_entries = max_entries
        self._holders: dict[str, dict[str, None]] = {}
        self._held: dict[str, OrderedDict[str, None]] = {}
        self._until_s: OrderedDict[Piece, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until_s)

    def pieces(self, worker: str) -> int:
        """Return how many pieces a worker holds."""
        return len(self._held.get(worker, ()))

    def put(
        self, worker: str, hashes: Sequence[str], now_s: float, *, bound: int | None = None
    ) -> None:
        """Believe that a worker holds a prompt: all pieces of ``hashes``, longest last.

        Args:
            worker: Its name.
            hashes: The prompt; of one longer than the bound, the beginning is held.
            now_s: The time, in seconds, of one clock that never goes back.
            bound: Pieces that this worker can hold; None: as the index was told.
        """
        bound = min(bound or self._worker_pieces, self._max_entries)
        until_s = float("inf") if self._ttl_s is None else now_s + self._ttl_s
        for piece in reversed(hashes[:bound]):
            self._add(worker, piece, until_s)
        held = self._held.get(worker, ())
        while len(held) > bound:
            self.drop(worker, next(iter(held)))
        while len(self._until_s) > self._max_entries:
            self.drop(*next(iter(self._until_s)))

    def hold(self, worker: str, piece: str) -> bool:
        """Note one piece; False when there is no room for it."""
        full = self.pieces(worker) >= self._worker_pieces or len(self) >= self._max_entries
        if full and worker not in self._holders.get(piece, ()):
            return False
        self._add(worker, piece, float("inf"))
        return True

    def _add(self, worker: str, piece: str, until_s: float) -> None:
        held = self._held.setdefault(worker, OrderedDict())
        held[piece] = None
        held.move_to_end(piece)
        self._until_s[worker, piece] = until_s
        self._until_s.move_to_end((worker, piece))
        self._holders.setdefault(piece, {})[worker] = None

    def drop(self, worker: str, piece: str) -> None:
        """A worker does not hold a piece any more, if it did."""
        if self._until_s.pop((worker, piece), None) is None:
            return
        held = self._held[worker]
        del held[piece]
        if not held:
            del self._held[worker]
        holders = self._holders[piece]
        del holders[worker]
        if not holders:
            del self._holders[piece]

    def forget(self, worker: str) -> None:
        """A worker holds nothing any more: it went, or nobody knows what it holds."""
        for piece in list(self._held.get(worker, ())):
            self.drop(worker, piece)

    def expire(self, now_s: float) -> None:
        """Give up what is believed no longer."""
        while self._until_s:
            oldest, until_s = next(iter(self._until_s.items()))
            if until_s > now_s:
                return
            self.drop(*oldest)

    def longest(
        self, hashes: Sequence[str], workers: Collection[str] | None = None
    ) -> list[tuple[str, int]]:
        """Return who holds how many leading pieces of a prompt, the best first.

        Args:
            hashes: The prompt, longest last.
            workers: Look only at these, which takes time by their number; None: name the best
                ``MOST_HOLDERS`` of all, in time that does not depend on how many there are.
        """
        if workers is not None:
            counts = [(name, self._count(name, hashes)) for name in workers]
            return sorted((c for c in counts if c[1]), key=lambda c: -c[1])
        deepest = _bisect(hashes, self._holders)
        found: dict[str, int] = {}
        for count in range(deepest, 0, -1):
            holders = self._holders[hashes[count - 1]]
            if len(holders) == len(found):
                continue  # the same ones
            for name in holders:
                if found.setdefault(name, count) == count and len(found) == MOST_HOLDERS:
                    return list(found.items())
        return list(found.items())

    def _count(self, worker: str, hashes: Sequence[str]) -> int:
        return _bisect(hashes, self._held.get(worker, ()))


def _bisect(hashes: Sequence[str], held: Collection[str]) -> int:
    """Return how many leading hashes are held; all before a held one are held too."""
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in held:
            low = middle + 1
        else:
            high = middle
    return low
