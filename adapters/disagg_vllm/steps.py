"""What the scheduler half tells the worker half in one engine step, and what comes back.

Plain dataclasses: the engine itself carries them between its own processes. Token ranges are
half-open; blocks are counted from the start of the request, block ids are the engine's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PublishStep:
    """Blocks of one request whose KV is complete after this step's forward pass.

    Attributes:
        handoff_id: The handoff.
        ticket: The gateway's ticket.
        num_tokens: Prompt tokens that the handoff will hold in the end.
        prompt: Digest of the prompt.
        first_block: First block to publish in this step.
        block_ids: Engine block ids of ``[first_block, first_block + len(block_ids))``.
        last: Whether this step completes the prompt.
    """

    handoff_id: str
    ticket: str
    num_tokens: int
    prompt: str
    first_block: int
    block_ids: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class LoadStep:
    """KV that the decode side wants for one request.

    Attributes:
        request_id: The engine's own request id.
        handoff_id: The handoff.
        ticket: The gateway's ticket.
        endpoints: Where the prefill ranks serve, as received.
        prompt: Digest of the prompt.
        first_token: First token to load: what the local prefix cache holds already, block aligned.
        end_token: End of the prompt.
        block_ids: Engine block ids from block 0 on, over the whole prompt.
    """

    request_id: str
    handoff_id: str
    ticket: str
    endpoints: tuple[Mapping[str, object], ...]
    prompt: str
    first_token: int
    end_token: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReleaseStep:
    """A handoff that the decode side will not read: end it at the publisher at once."""

    handoff_id: str
    ticket: str
    endpoints: tuple[Mapping[str, object], ...]
    failed: str = ""


@dataclass(slots=True)
class StepPlan:
    """Everything the worker half has to do in one step."""

    publish: list[PublishStep] = field(default_factory=list)
    load: list[LoadStep] = field(default_factory=list)
    release: list[ReleaseStep] = field(default_factory=list)
    abort: list[tuple[str, str]] = field(default_factory=list)
    """``(handoff_id, reason)``: publications that will never be completed."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How one rank's load of one request ended; ``problem`` is empty on success."""

    request_id: str
    handoff_id: str
    problem: str = ""
    transport: str = ""
    form: str = ""
    num_tokens: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class StepResult:
    """What the ranks of a worker tell the scheduler half; aggregated over ranks.

    Attributes:
        ended: handoff id -> number of ranks whose publication ended since the last step.
        loads: One entry for each load that ended on some rank.
    """

    ended: Counter[str] = field(default_factory=Counter)
    loads: list[LoadResult] = field(default_factory=list)

    def aggregate(self, other: StepResult) -> StepResult:
        """Return the sum of two ranks' results."""
        return StepResult(self.ended + other.ended, self.loads + other.loads)

    def __bool__(self) -> bool:
        return bool(self.ended or self.loads)
