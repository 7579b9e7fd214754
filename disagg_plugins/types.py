"""The nouns of the project, as frozen dataclasses.

Nothing here imports an engine or does I/O. Times are seconds, sizes bytes or tokens, ranges
half-open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NewType

HandoffId = NewType("HandoffId", str)
"""32 lower-case hexadecimal digits (128 random bits), minted by the gateway."""

Family = Literal["relay", "rendezvous"]
"""How a handoff is arranged: *relay* (prefill answers, decode is called with its params) or
*rendezvous* (both are called at once under an id that the gateway chose)."""

TokensBy = Literal["ids", "tokenizer", "estimate"]
"""How a count of prompt tokens came about: they were given, counted by the model's own tokenizer,
or estimated from the text's length."""


class Role(StrEnum):
    """What a worker is used for."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    def serves(self, role: Role) -> bool:
        """Return whether a worker of this role may do the work of ``role``."""
        return self is Role.BOTH or self is role


@dataclass(frozen=True, slots=True)
class Worker:
    """One running engine server.

    Attributes:
        name: Unique in its fleet.
        url: ``http://host:port`` without a path.
        engine: The name of a dialect: ``vllm``, ``sglang``, ``trtllm``.
        role: What it is used for.
        capacity: Requests it should be given at once.
        labels: Free text for plugins: zone, hardware, revision.
        whole: Whether it can serve a request alone, reading the prompt itself. An engine's decode
            mode may know handed-over requests only.
        handoffs: Whether it takes part in handoffs. An engine may have modes for the two phases
            and none for both.
        kv_tokens: Tokens that its KV cache holds, or None where nobody has said so.
        movable: Declared for both roles: the gateway may move it from one to the other.
        role_switch: Its server has one role at a time and switches it when it is told to.
    """

    name: str
    url: str
    engine: str
    role: Role
    capacity: int = 64
    labels: Mapping[str, str] = field(default_factory=dict)
    whole: bool = True
    handoffs: bool = True
    kv_tokens: int | None = None
    movable: bool = False
    role_switch: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What the gateway knows of a worker at this moment.

    Attributes:
        requests: Requests in flight through this gateway.
        prompt_tokens: Their prompt tokens that are still being read (prefill work queued).
        failures: Consecutive failures; 0 after a success.
        healthy: False while the gateway keeps new traffic away from it.
        output_tokens: Output tokens still expected of them: their bounds within reason, and a
            usual answer's for a request without one (``scheduling.prediction.expected_output``).
        kv_tokens: Tokens of KV that they hold or will: their prompts and expected outputs.
        prefills: Prompts that are being read.
        kv_usage: Share of its KV cache in use as its engine says, 0 to 1, or None.
        trial: It has just come back and is given one request at a time until one succeeds.
        draining: It ends what it has and takes nothing new.
    """

    requests: int = 0
    prompt_tokens: int = 0
    failures: int = 0
    healthy: bool = True
    output_tokens: int = 0
    kv_tokens: int = 0
    prefills: int = 0
    kv_usage: float | None = None
    trial: bool = False
    draining: bool = False


IDLE = WorkerLoad()
"""The load of a worker that nothing is known of."""


@dataclass(frozen=True, slots=True)
class FleetIndex:
    """What a fleet's keeper knows without looking at each worker.

    Attributes:
        ready: The healthy workers that may do the work of a role (prefill, decode), in the
            policy's order.
        names: Every worker by its name.
        room: How many of ``ready`` may be given one more request, by role.
    """

    ready: Mapping[Role, Sequence[Worker]]
    names: Mapping[str, Worker]
    room: Mapping[Role, int]


@dataclass(frozen=True, slots=True)
class FleetView:
    """The workers of one deployment and their load, as the scheduler may see them.

    Attributes:
        workers: In the policy's order.
        loads: By name.
        pair_problems: Why two workers cannot share a handoff, by the names of prefill and decode;
            pairs that can are absent.
        index: Lists that somebody keeps up to date; without them they are made whenever they are
            asked for, which takes time by the number of workers.
    """

    workers: Sequence[Worker]
    loads: Mapping[str, WorkerLoad]
    pair_problems: Mapping[tuple[str, str], str] = field(default_factory=dict)
    index: FleetIndex | None = field(default=None, compare=False, repr=False)

    def load(self, worker: Worker) -> WorkerLoad:
        """Return the load of ``worker``; an unknown worker is idle and healthy."""
        return self.loads.get(worker.name, IDLE)

    def serving(self, role: Role) -> Sequence[Worker]:
        """Return the healthy workers that may do the work of ``role``, in the policy's order."""
        if self.index is not None:
            return self.index.ready[role]
        return tuple(w for w in self.workers if w.role.serves(role) and self.load(w).healthy)

    def worker(self, name: str) -> Worker | None:
        """Return the worker of a name, or None."""
        if self.index is not None:
            return self.index.names.get(name)
        return next((w for w in self.workers if w.name == name), None)

    def has_room(self, role: Role) -> bool:
        """Return whether some healthy worker of ``role`` may be given one more request.

        It has fewer than its capacity, or none while it is on trial.
        """
        if self.index is not None:
            return self.index.room[role] > 0
        for worker in self.serving(role):
            load = self.load(worker)
            if load.requests < (1 if load.trial else worker.capacity):
                return True
        return False

    def pair_problem(self, prefill: Worker, decode: Worker) -> str | None:
        """Return why these two cannot share a handoff, or None; a worker fits itself."""
        return self.pair_problems.get((prefill.name, decode.name))


@dataclass(frozen=True, slots=True)
class RequestProfile:
    """What a scheduler may know before routing.

    Attributes:
        request_id: The gateway's id of the request.
        endpoint: ``/v1/completions`` or ``/v1/chat/completions``.
        model: The model named in the request.
        prompt_tokens: Count of prompt tokens; an estimate unless ``prompt_tokens_exact``.
        prompt_tokens_exact: Whether the count is exact (prompt given as token ids).
        max_output_tokens: The output bound, or None when the request sets none.
        stream: Whether the client asked for a stream.
        unsplittable: Why this request cannot be split (``n > 1``, ...), or None.
        prefix_hashes: Hashes of the prompt's leading pieces, longest last.
        slo_class: The SLO class, or None.
        tenant: The tenant, or None.
        arrival_s: Arrival on the gateway's monotonic clock, in seconds.
        deadline_s: When its client stops waiting for the whole answer, on the same clock, or None.
        session: What ties requests of one conversation together, or None.
        priority: More urgent requests have a higher one.
        ttft_slo_s: The bound on TTFT that its SLO class sets, in seconds, or None.
        tpot_slo_s: The bound on TPOT that its SLO class sets, in seconds, or None.
        tokens_by: How ``prompt_tokens`` came about: ``ids``, ``tokenizer`` or ``estimate``.
        admitted: It was admitted before and is decided again: it waited, or a worker failed it.
        queued_tokens: Prompt tokens that wait at the gateway for a prefill worker, of requests
            with its priority or a higher one.
        own_queued_tokens: Prompt tokens that wait there of its own tenant.
        cached_tokens: How many of the prompt's tokens a worker is believed to hold, by its name,
            the best first; workers that hold none are absent.
    """

    request_id: str
    endpoint: str
    model: str
    prompt_tokens: int
    prompt_tokens_exact: bool = False
    max_output_tokens: int | None = None
    stream: bool = False
    unsplittable: str | None = None
    prefix_hashes: Sequence[str] = ()
    slo_class: str | None = None
    tenant: str | None = None
    arrival_s: float = 0.0
    deadline_s: float | None = None
    session: str | None = None
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    tokens_by: TokensBy = "estimate"
    admitted: bool = False
    queued_tokens: int = 0
    own_queued_tokens: int = 0
    cached_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Local:
    """The whole request runs on one worker."""

    decode: Worker


@dataclass(frozen=True, slots=True)
class Disaggregated:
    """The prompt is read on ``prefill``, the answer written on ``decode``."""

    prefill: Worker
    decode: Worker


Route = Local | Disaggregated


@dataclass(frozen=True, slots=True)
class Decision:
    """A route and why it was chosen.

    Attributes:
        route: Where the request goes.
        reason: In words, for the per-request record.
        problem: What keeps workers from sharing a handoff, where that decided; or empty.
        taken: It is local only because every prefill worker that fits is taken: waiting helps.
    """

    route: Route
    reason: str
    problem: str = ""
    taken: bool = False


@dataclass(frozen=True, slots=True)
class SplitDecision:
    """Whether to split one request, and why."""

    split: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The request is not taken now.

    Attributes:
        reason: Told to the client.
        retry_after_s: Sent as ``Retry-After``.
        status: HTTP status, 429 or 503.
    """

    reason: str
    retry_after_s: float = 1.0
    status: int = 503


@dataclass(frozen=True, slots=True)
class TransportCapabilities:
    """What a transport can do, stated rather than guessed.

    Attributes:
        same_host: Works between two processes of one host.
        cross_host: Works between hosts.
        staging: The prefill side copies into a staging area that the peer reads.
        one_sided: The peer reads without waking the publisher for each piece.
        device_memory: Can read from or write to accelerator memory without host staging.
    """

    same_host: bool
    cross_host: bool
    staging: bool = True
    one_sided: bool = False
    device_memory: bool = False


@dataclass(frozen=True, slots=True)
class HandoffPair:
    """The two ends of a handoff as a transport chooser sees them.

    Attributes:
        same_host: Whether both ends run on one host and may share memory.
        prefill_fingerprint: The model fingerprint of the prefill side, hexadecimal.
        decode_fingerprint: The model fingerprint of the decode side, hexadecimal.
        payload_bytes: Bytes to be moved.
    """

    same_host: bool
    prefill_fingerprint: str
    decode_fingerprint: str
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class HandoffEvent:
    """One step of a handoff, for ``disagg_on_handoff``.

    Attributes:
        handoff_id: The handoff.
        step: ``opened``, ``published``, ``claimed``, ``loaded``, ``consumed``, ``expired`` or
            ``failed``.
        at_s: Wall-clock time in seconds since the epoch.
        detail: Numbers and words of the step (bytes, tokens, seconds, transport, problem).
    """

    handoff_id: HandoffId
    step: str
    at_s: float
    detail: Mapping[str, str | int | float] = field(default_factory=dict)
