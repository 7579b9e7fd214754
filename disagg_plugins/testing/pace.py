"""How long an engine takes: continuous batching of one worker, in steps of virtual time (pure).

A step takes every running answer one token further and fills what is left of its token budget with
prompt tokens, as vLLM's chunked prefill does. Its time is a sum::

    base_s + per_request_s * requests + per_kv_token_s * context of the running answers
           + per_prompt_token_s * prompt tokens
           + per_prompt_pair_s * (end^2 - begin^2) of each piece of a prompt

which for one whole prompt is the quadratic that DistServe fitted. Simpler than an engine in two
points: room for a request's whole answer is kept from its start, so that nothing is ever preempted,
and the prefix cache has room of its own.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from disagg_plugins.errors import ConfigError

CHARS_PER_TOKEN = 4
"""Bytes of a pretend token: what the gateway assumes where it cannot count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one engine on one accelerator takes, in seconds.

    Attributes:
        base_s: A step without anything in it.
        per_request_s: One running answer in a step.
        per_kv_token_s: One token of context that a running answer reads in a step.
        per_prompt_token_s: One prompt token.
        per_prompt_pair_s: One pair of prompt tokens (attention over the prompt).
        budget_tokens: Tokens of a step (vLLM's ``--max-num-batched-tokens``).
        max_requests: Requests that run at once (``--max-num-seqs``); others wait in order.
        kv_tokens: Room for the prompts and answers of what runs.
        cached_blocks: Blocks that the prefix cache keeps, the least recently used leave; 0: none.
        block_tokens: Tokens of a block.
        transfer_base_s: Taking a handoff over, whatever its size.
        transfer_per_token_s: One token's KV on its way.
    """

    base_s: float
    per_request_s: float
    per_kv_token_s: float
    per_prompt_token_s: float
    per_prompt_pair_s: float = 0.0
    budget_tokens: int = 2048
    max_requests: int = 256
    kv_tokens: int = 65_536
    cached_blocks: int = 2048
    block_tokens: int = 16
    transfer_base_s: float = 0.005
    transfer_per_token_s: float = 0.0


PROFILES = {
    # SmolLM2-135M in bfloat16 on one core, vLLM 0.32 for CPUs: the benchmark `interference` saw
    # steps of 46 ms, of 76 ms with 128 prompt tokens in them.
    "cpu-vllm": Profile(
        base_s=0.045,
        per_request_s=0.001,
        per_kv_token_s=2e-6,
        per_prompt_token_s=0.23e-3,
        per_prompt_pair_s=2e-8,
        kv_tokens=23_000,
        cached_blocks=1400,
        transfer_base_s=0.015,
        transfer_per_token_s=12e-6,
    ),
    # DistServe (OSDI'24), simdistserve/estimators/profile_data: OPT-13B on one A100-80G, fp16,
    # prefill 18.10 + 0.1019 n + 7.12e-6 n^2 ms, decode 19.93 + 6.27e-4 context + 0.0385 batch ms,
    # KV room 66,144 tokens. A token's KV is 0.8 MB; the transfer is that over 50 GB/s.
    "opt-13b-a100": Profile(
        base_s=0.01993,
        per_request_s=0.0385e-3,
        per_kv_token_s=6.27e-7,
        per_prompt_token_s=0.1019e-3,
        per_prompt_pair_s=7.12e-9,
        kv_tokens=66_144,
        cached_blocks=2048,
        transfer_base_s=0.005,
        transfer_per_token_s=16e-6,
    ),
}
"""Measured profiles by name."""


def read_profile(name: str) -> Profile:
    """Return a profile by its name or from a JSON file of its fields.

    Raises:
        ConfigError: There is no such name or file, or the file does not describe a profile.
    """
    if name in PROFILES:
        return PROFILES[name]
    try:
        return msgspec.json.decode(Path(name).read_bytes(), type=Profile)
    except OSError as exc:
        known = ", ".join(sorted(PROFILES))
        raise ConfigError(f"no timing profile {name!r}: give a file or one of {known}") from exc
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"{name} is not a timing profile: {exc}") from exc


def block_hashes(prompt: bytes, block_tokens: int) -> tuple[int, ...]:
    """Return one number for each whole block of a prompt, which stands for all before it too."""
    size, value = block_tokens * CHARS_PER_TOKEN, 0
    found = []
    for end in range(size, len(prompt) + 1, size):
        value = zlib.crc32(prompt[end - size : end], value)
        found.append(value)
    return tuple(found)


@dataclass(slots=True, eq=False)
class Job:
    """One request of a worker.

    Attributes:
        prompt_tokens: Tokens of its prompt, at least 1.
        output_tokens: Tokens it writes, at least 1.
        blocks: Hashes of the prompt's whole blocks.
        loaded: The prompt's KV came by a handoff: only its last token is computed.
        read: Prompt tokens whose KV is there.
        written: Tokens written.
        cached: Prompt tokens that the prefix cache had.
        over: Complete or dropped.
    """

    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int] = ()
    loaded: bool = False
    read: int = 0
    written: int = 0
    cached: int = 0
    over: bool = False

    @property
    def kv_tokens(self) -> int:
        """Tokens for which room is kept."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One step: how long it takes, and who has one more token at its end."""

    seconds: float
    wrote: list[Job]


@dataclass(slots=True)
class PrefixCache:
    """The blocks that a worker still has, the least recently used first."""

    bound: int
    _blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._blocks)

    def keep(self, blocks: Sequence[int]) -> None:
        """Keep these blocks; a prefix's head outlives its tail."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.bound:
            self._blocks.popitem(last=False)

    def hits(self, blocks: Sequence[int]) -> int:
        """Return how many blocks from the start are here."""
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        return count


class Batch:
    """The requests of one worker."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.cache = PrefixCache(profile.cached_blocks)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.held_tokens = 0

    def cached_tokens(self, job: Job) -> int:
        """Return the prompt tokens that need not be computed; the last one always is."""
        found = self.cache.hits(job.blocks) * self.profile.block_tokens
        return min(found, job.prompt_tokens - 1)

    def transfer_s(self, job: Job) -> float:
        """Return how long the KV of a job takes to come; what is cached here stays where it is."""
        profile = self.profile
        missing = job.prompt_tokens - self.cached_tokens(job)
        return profile.transfer_base_s + profile.transfer_per_token_s * missing

    def add(self, job: Job) -> None:
        """Take a job; it runs once there is room."""
        self.waiting.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job that is not over."""
        if job.over:
            return
        job.over = True
        if job in self.running:
            self.running.remove(job)
            self.held_tokens -= job.kv_tokens
        else:
            self.waiting.remove(job)

    def step(self) -> Step | None:
        """Take one step; None when there is nothing to do."""
        profile, wrote = self.profile, []
        left = profile.budget_tokens
        seconds = profile.base_s
        for job in self.running:
            if job.read == job.prompt_tokens:
                left -= 1
                context = job.prompt_tokens + job.written
                seconds += profile.per_request_s + profile.per_kv_token_s * context
                wrote.append(job)
        for job in self.running:
            if job.read < job.prompt_tokens and left > 0:
                left, taken_s = self._read(job, left, wrote)
                seconds += taken_s
        while left > 0 and self._admit():
            left, taken_s = self._read(self.running[-1], left, wrote)
            seconds += taken_s
        if not self.running:
            return None
        for job in wrote:
            job.written += 1
            if job.written >= job.output_tokens:
                self.drop(job)
        return Step(seconds, wrote)

    def _admit(self) -> bool:
        """Start the first that waits; a job larger than the room runs alone."""
        profile = self.profile
        if not self.waiting or len(self.running) >= profile.max_requests:
            return False
        job = self.waiting[0]
        if self.running and self.held_tokens + job.kv_tokens > profile.kv_tokens:
            return False
        self.waiting.popleft()
        self.running.append(job)
        self.held_tokens += job.kv_tokens
        job.cached = self.cached_tokens(job)
        job.read = job.prompt_tokens - 1 if job.loaded else job.cached
        return True

    def _read(self, job: Job, left: int, wrote: list[Job]) -> tuple[int, float]:
        """Read a piece of a prompt; return what is left of the budget and the time it takes."""
        profile, begin = self.profile, job.read
        job.read = end = min(job.prompt_tokens, begin + left)
        seconds = profile.per_prompt_token_s * (end - begin)
        seconds += profile.per_prompt_pair_s * (end * end - begin * begin)
        if end == job.prompt_tokens:
            self.cache.keep(job.blocks)
            wrote.append(job)
        return left - (end - begin), seconds
