"""Everything the gateway knows of one worker, and how it falls ill and recovers (sans-IO)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from disagg_plugins.types import Worker, WorkerLoad

MAX_KINDS = 64
"""Distinct failure kinds remembered a worker; they come from the gateway's own short list and
HTTP status codes."""

NOT_SICK = re.compile(r"http_4\d\d|no_handoff|gone|drained")
"""Failures that a worker with sound health answers: they are counted, but it stays in."""

GONE = ("refused", "unreachable")
"""Failures after which nothing is known of the process: it may be another one when it is back."""

NOT_PROBED = "not probed yet"

STEADY_SUCCESSES = 10
"""Requests that a worker serves after it came back until its relapses are forgotten."""

MAX_RELAPSES = 32
"""A rest is bounded long before it has been doubled so often."""


@dataclass(slots=True)
class WorkerState:
    """Everything known of one worker.

    Attributes:
        worker: As it is used now.
        declared: As the policy, the watched file or an operator described it.
        order: Its place among all workers that ever joined; no two have the same.
        reachable: Its last health probe was answered, whatever requests do.
        draining: It takes nothing new.
        kept: It is ill and used all the same: every other worker of a role is worse.
        trial: It has just come back and is given one request at a time.
        outs: How often it was taken out.
        relapses: How often in a row it was taken out soon after it had come back.
        steady: Requests served since it came back.
        slow: It was taken out because it is far slower than its peers.
        slow_outs: How often in a row that was so; forgotten once it is as quick as they are.
        signs: Signs of life that its engine gave: prompts read, answers begun or ended.
        role_known: Whether its server is known to be in the role of ``worker``; matters for
            servers whose role is switched.
        switching: Its server is being told to take another role.
        announce: ``host:port`` where its adapter hears of handoffs; empty where it need not.
    """

    worker: Worker
    declared: Worker
    order: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    kv_tokens: int = 0
    prefills: int = 0
    kv_usage: float | None = None
    failures: int = 0
    healthy: bool = False
    reason: str = NOT_PROBED
    models: tuple[str, ...] = ()
    served: int = 0
    tokens_written: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    last_problem: str = ""
    hello: Mapping[str, object] | None = None
    endpoints: dict[int, Mapping[str, object]] = field(default_factory=dict)
    announce: str = ""
    reachable: bool = False
    draining: bool = False
    kept: bool = False
    trial: bool = False
    outs: int = 0
    relapses: int = 0
    steady: int = 0
    slow: bool = False
    slow_outs: int = 0
    signs: int = 0
    role_known: bool = True
    switching: bool = False

    @property
    def takes_work(self) -> bool:
        """Whether it is given new requests."""
        return (self.healthy or self.kept) and not self.draining

    @property
    def has_room(self) -> bool:
        """Whether it takes requests and has fewer than it may have."""
        bound = 1 if self.trial else self.worker.capacity
        return self.takes_work and self.requests < bound

    def load(self) -> WorkerLoad:
        """Return what the scheduler sees."""
        return WorkerLoad(
            self.requests,
            self.prompt_tokens,
            self.failures,
            self.takes_work,
            self.output_tokens,
            self.kv_tokens,
            self.prefills,
            self.kv_usage,
            self.trial,
            self.draining,
        )

    def succeeded(self) -> None:
        """It did its part of a request."""
        self.served += 1
        self.signs += 1
        self.failures = 0
        self.trial = False
        if not self.healthy:  # begun before it went out: says nothing of how it comes back
            return
        self.steady += 1
        if self.steady >= STEADY_SUCCESSES:
            self.relapses = 0

    def count_failure(self, kind: str, detail: str) -> None:
        """It failed a request; says nothing of its health yet."""
        if kind in self.failed or len(self.failed) < MAX_KINDS:
            self.failed[kind] = self.failed.get(kind, 0) + 1
        self.last_problem = f"{kind}: {detail}"

    def out(self, reason: str) -> None:
        """Take it out of use."""
        if self.healthy:
            if self.outs and self.steady < STEADY_SUCCESSES:
                self.relapses = min(MAX_RELAPSES, self.relapses + 1)
            self.outs += 1
        self.healthy = self.trial = self.slow = False
        self.reason = reason

    def out_for_slowness(self, reason: str) -> None:
        """Take it out because it is slow: it rests from the first time on.

        Its probes go well, so that nothing else would keep it out.
        """
        self.out(reason)
        self.slow = True
        self.slow_outs = min(MAX_RELAPSES, self.slow_outs + 1)
        self.relapses = max(self.relapses, self.slow_outs)

    def back(self) -> None:
        """A probe says that it can serve."""
        if not self.healthy and self.outs:
            self.trial = True
            self.steady = 0
        self.healthy = self.reachable = True
        self.slow = False
        self.reason = ""
        self.failures = 0

    def unheard(self) -> None:
        """Forget what its process said of itself: another one, or another role, is coming."""
        self.hello = None
        self.endpoints.clear()
        self.announce = ""
        self.role_known = not self.worker.role_switch


def rest_of(relapses: int, rest_s: float, rest_max_s: float) -> float:
    """Return how long a worker is left alone after it was taken out, in seconds.

    Not at all the first time; ``rest_s`` after a relapse, doubled with each one in a row.
    """
    if relapses == 0:
        return 0.0
    longest: float = min(rest_max_s, rest_s * 2.0 ** (relapses - 1))
    return longest


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of one worker, in tokens.

    Attributes:
        prompt_tokens: To be read there; 0 where the KV comes from elsewhere.
        context_tokens: Of the prompt, whose KV it will hold.
        output_tokens: To be written there, as far as one can know.
        given_to: The ``order`` of the worker it was given to, so that a later one of the same
            name has nothing to do with it; None: whoever bears the name.
    """

    prompt_tokens: int = 0
    context_tokens: int = 0
    output_tokens: int = 0
    given_to: int | None = None
