"""Which of the requests that wait for a prefill worker goes next. Pure: times are parameters.

Three rules, each inside the one before it:

1. A higher ``profile.priority`` goes first, always. It comes from the policy (SLO class, tenant)
   and never from the request's body, where every client could raise its own. The wait of a low
   priority is bounded by ``max_wait_s`` only.
2. Tenants of one priority share by prompt tokens, in proportion to their weights: the tenant that
   has had the least is next. This is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).
   Deficit round-robin bounds the same difference between tenants, but needs a quantum as large as
   the longest prompt and moves its state even to look at who would be next.
3. Within a tenant, what plugins say (``disagg_score_queue``) comes first, then the built-in order:
   ``fifo``, ``shortest`` first, or the earliest ``deadline`` (arrival plus the bound on TTFT, or
   the client's own if that is sooner).

The built-in orders are no plugins: a score is given once, in 0 to 1, when waiting begins. It knows
neither how long others will have waited when a slot frees nor an absolute deadline.

Nobody starves within a tenant: who has waited ``ageing_s`` goes before all who have not, in order
of waiting. By deadlines one is that old only after its own deadline; and a request without one has
``ageing_s`` as its bound. Tenants cannot starve each other, because what one has had only grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from disagg_plugins.types import RequestProfile

T = TypeVar("T")

Order = Literal["fifo", "shortest", "deadline"]

SPARE = 64
"""Places of requests that have left, and tenants that have nothing to wait for, are kept up to this
many more than there are others: clearing them away costs as much as all of them."""


@dataclass(slots=True, eq=False)
class Waiting(Generic[T]):
    """One request that waits.

    Attributes:
        payload: Whatever the caller knows it by.
        priority: Higher goes first.
        tenant: Whose share it uses.
        weight: Of the tenant.
        prompt_tokens: What a slot costs the tenant; at least 1.
        since_s: When it began to wait.
        rank: Lower goes first within its tenant.
        aged_s: From when on it goes before all that are not aged.
        here: False once it has left.
    """

    payload: T
    priority: int
    tenant: str
    weight: float
    prompt_tokens: int
    since_s: float
    rank: tuple[float, float, int]
    aged_s: float
    here: bool = True

    def place(self, now_s: float) -> tuple[int, float, float, int]:
        """Return what sorts the requests of one tenant."""
        if self.aged_s <= now_s:
            return (0, self.aged_s, 0.0, self.rank[2])
        return (1, *self.rank)


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """The requests of one tenant and priority.

    Attributes:
        start: What the tenant has had, in tokens by weight, when its next request gets a slot.
        waiting: How many wait.
    """

    start: float
    waiting: int = 0
    by_rank: list[tuple[tuple[float, float, int], Waiting[T]]] = field(default_factory=list)
    by_age: list[tuple[float, int, Waiting[T]]] = field(default_factory=list)

    def add(self, request: Waiting[T]) -> None:
        self.waiting += 1
        heapq.heappush(self.by_rank, (request.rank, request))
        heapq.heappush(self.by_age, (request.aged_s, request.rank[2], request))

    def left(self) -> None:
        """One has left; its places are cleared when they come up, or when they are many."""
        self.waiting -= 1
        if len(self.by_rank) > 2 * self.waiting + SPARE:
            self.by_rank = [place for place in self.by_rank if place[1].here]
            heapq.heapify(self.by_rank)
        if len(self.by_age) > 2 * self.waiting + SPARE:
            self.by_age = [place for place in self.by_age if place[2].here]
            heapq.heapify(self.by_age)

    def next(self, now_s: float) -> Waiting[T]:
        """Return the one that goes next; there must be one."""
        while not self.by_age[0][2].here:
            heapq.heappop(self.by_age)
        if self.by_age[0][0] <= now_s:
            return self.by_age[0][2]
        while not self.by_rank[0][1].here:
            heapq.heappop(self.by_rank)
        return self.by_rank[0][1]


@dataclass(slots=True, eq=False)
class _Level(Generic[T]):
    """The tenants of one priority.

    Attributes:
        virtual: The ``start`` of the request that got the last slot.
        tokens: Prompt tokens that wait.
    """

    virtual: float = 0.0
    tokens: int = 0
    waiting: int = 0
    lines: dict[str, _Line[T]] = field(default_factory=dict)

    def next_line(self, now_s: float) -> _Line[T]:
        """Return the line whose turn it is; between equals the more urgent request decides."""
        least = min(line.start for line in self.lines.values() if line.waiting)
        equals = [x for x in self.lines.values() if x.waiting and x.start <= least]
        if len(equals) == 1:
            return equals[0]
        return min(equals, key=lambda line: line.next(now_s).place(now_s))

    def forget(self) -> None:
        """Drop tenants that wait for nothing and have had no more than the others."""
        if len(self.lines) > 2 * self.waiting + SPARE:
            kept = {n: x for n, x in self.lines.items() if x.waiting or x.start > self.virtual}
            self.lines = kept


class PrefillQueue(Generic[T]):
    """Requests that wait for a prefill slot.

    Args:
        order: Within a tenant.
        ageing_s: See the module's text.
    """

    def __init__(self, order: Order = "fifo", *, ageing_s: float = 1.0) -> None:
        self._order = order
        self._ageing_s = ageing_s
        self._levels: dict[int, _Level[T]] = {}
        self._size = 0
        self._numbers = count()
        self._tokens_of: dict[str, int] = {}

    def __len__(self) -> int:
        return self._size

    def add(
        self,
        profile: RequestProfile,
        payload: T,
        *,
        now_s: float,
        score: float = 0.5,
        tenant: str = "",
        weight: float = 1.0,
    ) -> Waiting[T]:
        """Let a request wait.

        Args:
            profile: The request.
            payload: What to know it by.
            now_s: The time, in seconds, on the clock of ``profile.arrival_s``.
            score: What plugins say of it, 0 to 1; higher goes first.
            tenant: Whose share of the slots it uses.
            weight: The tenant's share, relative to the others'.
        """
        number = next(self._numbers)
        aged_s = now_s + self._ageing_s
        order = 0.0
        if self._order == "shortest":
            order = float(profile.prompt_tokens)
        elif self._order == "deadline":
            slo_s = self._ageing_s if profile.ttft_slo_s is None else profile.ttft_slo_s
            order = profile.arrival_s + slo_s
            if profile.deadline_s is not None:
                order = min(order, profile.deadline_s)
            aged_s = max(aged_s, order)
        request = Waiting(
            payload,
            profile.priority,
            tenant,
            weight,
            max(1, profile.prompt_tokens),
            now_s,
            (-score, order, number),
            aged_s,
        )
        level = self._levels.setdefault(profile.priority, _Level())
        line = level.lines.get(tenant)
        if line is None:
            line = level.lines[tenant] = _Line(level.virtual)
        elif not line.waiting:
            line.start = max(line.start, level.virtual)  # what was not used is not saved up
        line.add(request)
        level.waiting += 1
        level.tokens += request.prompt_tokens
        self._size += 1
        self._tokens_of[tenant] = self._tokens_of.get(tenant, 0) + request.prompt_tokens
        return request

    def leave(self, request: Waiting[T]) -> bool:
        """Take out a request that got no slot; False when it was not here any more."""
        return self._take_out(request, served=False)

    def serve(self, request: Waiting[T]) -> bool:
        """Take out a request that got a slot, on its tenant's account."""
        return self._take_out(request, served=True)

    def _take_out(self, request: Waiting[T], *, served: bool) -> bool:
        if not request.here:
            return False
        request.here = False
        level = self._levels[request.priority]
        line = level.lines[request.tenant]
        if served:
            level.virtual = max(level.virtual, line.start)
            line.start += request.prompt_tokens / request.weight
        line.left()
        level.waiting -= 1
        level.tokens -= request.prompt_tokens
        level.forget()
        if not level.waiting:
            del self._levels[request.priority]
        self._size -= 1
        tokens = self._tokens_of.pop(request.tenant) - request.prompt_tokens
        if tokens:
            self._tokens_of[request.tenant] = tokens
        return True

    def offers(self, now_s: float, most: int) -> Iterator[Waiting[T]]:
        """Yield who goes next, then who would go if that one cannot use the slot, up to ``most``.

        The second and later ones cost a look at all that wait.
        """
        if not self._size or most < 1:
            return
        first = self._levels[max(self._levels)].next_line(now_s).next(now_s)
        yield first
        if most > 1 and self._size > 1:
            others = [r for r in self._everybody() if r is not first]
            yield from heapq.nsmallest(most - 1, others, key=lambda r: self._place(r, now_s))

    def late(self, since_s: float) -> list[Waiting[T]]:
        """Return those that began to wait at ``since_s`` or before."""
        return [request for request in self._everybody() if request.since_s <= since_s]

    def tokens_before(self, priority: int) -> int:
        """Return the prompt tokens of those that wait with this priority or a higher one."""
        return sum(lv.tokens for each, lv in self._levels.items() if each >= priority)

    def tokens_of(self, tenant: str) -> int:
        """Return the prompt tokens that wait for one tenant."""
        return self._tokens_of.get(tenant, 0)

    def _everybody(self) -> Iterator[Waiting[T]]:
        for level in self._levels.values():
            for line in level.lines.values():
                yield from (request for _, request in line.by_rank if request.here)

    def _place(self, request: Waiting[T], now_s: float) -> tuple[float, ...]:
        start = self._levels[request.priority].lines[request.tenant].start
        return (-request.priority, start, *request.place(now_s))
