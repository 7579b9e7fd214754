"""What the scheduler half tells the worker halves; pickled where there are several ranks.

Nothing but builtins: an object that cannot be pickled would pass on one rank and fail on two.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PublishStep:
    """One prompt is complete with this iteration.

    Attributes:
        request_id: The request.
        ticket: The gateway's.
        num_tokens: Of the prompt.
        prompt: Digest of the prompt.
        blocks: Its blocks in order.
    """

    request_id: int
    ticket: str
    num_tokens: int
    prompt: str
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Staged:
    """Where a fetched prompt's KV is: memory of the scheduler's process, mapped by the others.

    Attributes:
        pid: Of that process.
        fd: The memory's descriptor there.
        offset: First byte.
        num_blocks: Blocks there: uint8 ``[num_blocks, layers, row_bytes]`` of all heads.
    """

    pid: int
    fd: int
    offset: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class LoadStep:
    """Fetched KV is copied into a request's blocks.

    Attributes:
        request_id: The request.
        staged: Where it is.
        first_token: First token that is copied.
        end_token: End of the half-open range.
        blocks: The request's blocks from token 0 on.
        until_s: Monotonic time of this machine until which it is there.
    """

    request_id: int
    staged: Staged
    first_token: int
    end_token: int
    blocks: tuple[int, ...]
    until_s: float


@dataclass(slots=True)
class Plan:
    """One iteration's part in handoffs."""

    publish: list[PublishStep] = field(default_factory=list)
    load: list[LoadStep] = field(default_factory=list)
