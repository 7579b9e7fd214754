"""What the engine says to whoever moves KV, and when: the one seam between the two.

The order of one iteration is that of TensorRT-LLM's executor loop::

    schedule -> for each new request: match, then allocated   (allocated also where nothing matched)
             -> begin                                          (also when all new ones only load)
    forward  -> before_layer, after_layer for each layer -> end
    sample   -> finished for each request that is over
    poll                                                       (every iteration, idle ones included)

All calls come from the engine's thread. What raises here ends the engine: a host that can go on
without KV says so by its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_reference.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What one request does in an iteration.

    Attributes:
        request: The request.
        first: Whether it is in a batch for the first time.
        new_blocks: Blocks that it was given since it was last in a batch; all of its prompt's where
            ``first``.
        start: Tokens whose KV is in the pool before: its own cache's, loaded and computed ones.
        count: Tokens that are computed now.
    """

    request: Request
    first: bool
    new_blocks: tuple[int, ...]
    start: int
    count: int

    @property
    def completes_prompt(self) -> bool:
        """Whether the prompt is read when this is done."""
        return self.start < len(self.request.prompt) <= self.start + self.count


@dataclass(frozen=True, slots=True)
class Batch:
    """What is computed in one iteration.

    Attributes:
        scheduled: In the order of the batch; requests that load asynchronously are not in it.
        parked: Requests that began to load asynchronously in this iteration.
    """

    scheduled: tuple[Scheduled, ...]
    parked: tuple[Request, ...] = ()


class ConnectorHost(Protocol):
    """Moves KV in and out of the engine's pools."""

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """Return how many further prompt tokens can be brought, and whether asynchronously.

        Args:
            request: A new request.
            computed_tokens: Those that the engine's own cache has.

        Returns:
            Together with ``computed_tokens`` fewer than the prompt has. Tokens that are not brought
            asynchronously are in the pool when ``begin`` returns, or layer by layer when
            ``before_layer`` does.
        """
        ...

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """The blocks of the whole prompt are there."""
        ...

    def begin(self, batch: Batch) -> None:
        """An iteration begins in which something was scheduled."""
        ...

    def before_layer(self, layer: int) -> None:
        """The KV of a layer is about to be read."""
        ...

    def after_layer(self, layer: int) -> None:
        """The new KV of a layer is in the pools."""
        ...

    def end(self) -> None:
        """The forward pass is over."""
        ...

    def cancel(self, request: Request) -> None:
        """A request that loads is given up: it is to be named as loaded as soon as may be."""
        ...

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """A request is over; True: its blocks stay until ``poll`` names it as saved."""
        ...

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the ids of requests that were saved, and of those that were loaded."""
        ...

    def close(self) -> None:
        """Let go of everything; bounded in time."""
        ...
