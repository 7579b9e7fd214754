"""What the engine computes next (pure): who is admitted, and how many tokens of whom.

A request is admitted when the blocks that it may ever need are free, so none that runs is evicted
(TensorRT-LLM's GUARANTEED_NO_EVICT). Answers go first, a token each; what is left of the budget
reads prompts, in chunks, in the order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from disagg_reference.hosting import Batch, Scheduled
from disagg_reference.request import Request, State

if TYPE_CHECKING:
    from disagg_reference.blocks import Blocks

Match = Callable[[Request, int], tuple[int, bool]]
Allocated = Callable[[Request, list[int]], None]


class Scheduler:
    """Plans iterations.

    Args:
        blocks: The KV blocks.
        budget_tokens: Tokens of one iteration.
        most_running: Requests in one batch.
    """

    def __init__(self, blocks: Blocks, *, budget_tokens: int, most_running: int) -> None:
        self.blocks = blocks
        self._budget_tokens, self._most_running = budget_tokens, most_running
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.loading: dict[int, Request] = {}
        self._given: dict[int, int] = {}  # blocks that a request's batches were told of

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.loading)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over all requests that are not over."""
        yield from self.running.values()
        yield from self.loading.values()
        yield from self.waiting

    def plan(self, match: Match, allocated: Allocated) -> Batch:
        """Return the next iteration; empty where there is nothing to do.

        Args:
            match: See ``ConnectorHost.match``.
            allocated: See ``ConnectorHost.allocated``.
        """
        left = self._budget_tokens
        found, parked = [], []
        for request in sorted(self.running.values(), key=_is_reading):
            count = min(left, request.num_tokens - request.computed_tokens)
            if count > 0:
                left -= count
                found.append(self._scheduled(request, count))
        # one that finds no budget is not admitted: what is matched is loaded in this iteration
        while left > 0 and (new := self._admit(match, allocated)) is not None:
            if new.state is State.LOADING:
                parked.append(new)
                continue
            count = min(left, new.num_tokens - new.computed_tokens)
            left -= count
            found.append(self._scheduled(new, count))
        return Batch(tuple(found), tuple(parked))

    def _admit(self, match: Match, allocated: Allocated) -> Request | None:
        """Admit the next request that waits; None: there is none, or no room for it."""
        if not self.waiting or len(self.running) + len(self.loading) >= self._most_running:
            return None
        request = self.waiting[0]
        cached = self.blocks.cached(request.prompt)
        needed = self.blocks.needed(request.most_tokens)
        if not self.blocks.admit(cached, needed):
            return None
        request.promised_blocks = needed - len(cached)
        request.blocks = [*cached]
        self._take(request, self.blocks.needed(len(request.prompt)))
        request.local_tokens = len(cached) * self.blocks.size_tokens
        matched, parks = match(request, request.local_tokens)
        left = len(request.prompt) - request.local_tokens
        if not 0 <= matched < left or (parks and not matched):
            raise ValueError(
                f"request {request.request_id}: {matched} of {left} tokens matched, "
                f"asynchronously: {parks}"
            )
        request.matched_tokens = matched
        allocated(request, request.blocks)
        self.waiting.popleft()  # not before: whoever waits hears of it where one of these raises
        if parks:
            request.state = State.LOADING
            self.loading[request.request_id] = request
        else:
            self._run(request)
        return request

    def loaded(self, request_id: int) -> Request:
        """A request's KV is there: it runs from the next iteration on.

        Raises:
            KeyError: No such request is loading.
        """
        request = self.loading.pop(request_id)
        self._run(request)
        return request

    def _run(self, request: Request) -> None:
        request.computed_tokens = request.local_tokens + request.matched_tokens
        request.state = State.RUNNING
        self.running[request.request_id] = request

    def over(self, request: Request) -> None:
        """A request is over; its blocks are the caller's to free."""
        self.running.pop(request.request_id, None)
        self.loading.pop(request.request_id, None)
        self._given.pop(request.request_id, None)
        if request.state is State.WAITING:
            self.waiting.remove(request)
        request.state = State.OVER

    def free(self, request: Request) -> None:
        """Give a request's blocks back."""
        self.blocks.give_back(request.blocks, request.promised_blocks)
        request.blocks, request.promised_blocks = [], 0

    def _take(self, request: Request, total: int) -> None:
        missing = total - len(request.blocks)
        if missing > 0:
            request.blocks += self.blocks.take(missing)
            request.promised_blocks -= missing

    def _scheduled(self, request: Request, count: int) -> Scheduled:
        self._take(request, self.blocks.needed(request.computed_tokens + count))
        told = self._given.get(request.request_id)
        self._given[request.request_id] = len(request.blocks)
        new = tuple(request.blocks[told or 0 :])
        return Scheduled(request, told is None, new, request.computed_tokens, count)


def _is_reading(request: Request) -> bool:
    return request.computed_tokens < len(request.prompt)
