"""What the gateway knows of its workers, and what follows from it (sans-IO).

A worker is healthy once a probe succeeded; ``unhealthy_after`` failures in a row, or a refused
connection, take it out until a probe succeeds again. A worker that serves another model than its
fleet stays out, with the reason told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from disagg_plugins.gateway.dialect import Dialect, pair_family, tells_endpoints
from disagg_plugins.gateway.pairs import Across, PairProblems
from disagg_plugins.types import Family, FleetIndex, FleetView, Role, Worker, WorkerLoad

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord

MAX_KINDS = 64
"""Distinct failure kinds remembered a worker; they come from the gateway's own short list and
HTTP status codes."""

NOT_SICK = re.compile(r"http_4\d\d|no_handoff")
"""Failures that a worker with sound health answers: they are counted, but it stays in."""


EXPECTED_OUTPUT_TOKENS = 256
"""Of a request that bounds its answer by nothing but the model: about the mean of chat traffic
(Azure's conversation trace of 2023: 211; ShareGPT: about 200)."""

MOST_EXPECTED_TOKENS = 4096
"""A bound may be any number, and most answers end far below a large one."""

PHASES = (Role.PREFILL, Role.DECODE)

MAX_RANKS = 256
"""As many as ``handoff.endpoints`` takes of one worker."""


MUST_AGREE = (
    (
        "fingerprint",
        "model fingerprints differ:",
        "run both with the same model, revision and dtype",
    ),
    ("tokenizer", "tokenizers differ:", "run both with the same tokenizer files"),
    ("chat_template", "chat templates differ:", "give both the same --chat-template, or none"),
)
"""What two workers say of themselves that must be equal before a request is split over them."""


@dataclass(slots=True)
class WorkerState:
    """Everything known of one worker."""

    worker: Worker
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    kv_tokens: int = 0
    prefills: int = 0
    kv_usage: float | None = None
    failures: int = 0
    healthy: bool = False
    reason: str = "not probed yet"
    models: tuple[str, ...] = ()
    served: int = 0
    tokens_written: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    last_problem: str = ""
    hello: Mapping[str, object] | None = None
    endpoints: dict[int, Mapping[str, object]] = field(default_factory=dict)

    def load(self) -> WorkerLoad:
        """Return what the scheduler sees."""
        return WorkerLoad(
            self.requests,
            self.prompt_tokens,
            self.failures,
            self.healthy,
            self.output_tokens,
            self.kv_tokens,
            self.prefills,
            self.kv_usage,
        )

    @property
    def has_room(self) -> bool:
        """Whether it takes requests and has fewer than its capacity."""
        return self.healthy and self.requests < self.worker.capacity


@dataclass(frozen=True, slots=True)
class Work:
    """What one request asks of one worker, in tokens.

    Attributes:
        prompt_tokens: To be read there; 0 where the KV comes from elsewhere.
        context_tokens: Of the prompt, whose KV it will hold.
        output_tokens: To be written there, as far as one can know.
    """

    prompt_tokens: int = 0
    context_tokens: int = 0
    output_tokens: int = 0


class FleetState:
    """The workers of one deployment."""

    def __init__(
        self,
        workers: tuple[Worker, ...],
        dialects: Mapping[str, Dialect],
        *,
        model: str | None,
        unhealthy_after: int,
    ) -> None:
        self.workers = workers = tuple(_with_dialect(w, dialects.get(w.engine)) for w in workers)
        self.dialects = dialects
        self.states = {w.name: WorkerState(w) for w in workers}
        self._model = model
        self._unhealthy_after = unhealthy_after
        self._names = {w.name: w for w in workers}
        self._loads = {name: state.load() for name, state in self.states.items()}
        self._stale: set[str] = set()  # loads to be made anew when somebody looks
        self._ready: dict[Role, Sequence[Worker]] = dict.fromkeys(PHASES, ())
        self._room = dict.fromkeys(PHASES, 0)
        self._roomy: set[str] = set()
        self._unsorted = True  # some worker's health changed: the lists are to be made anew
        self._pairs = PairProblems(self._names, self._pair_problem, self._kind)
        index = FleetIndex(self._ready, self._names, self._room)
        self._view = FleetView(workers, self._loads, self._pairs, index)
        for worker in workers:
            self._pairs.changed(worker)

    def view(self) -> FleetView:
        """Return the fleet as the scheduler sees it now; the next call brings it up to date."""
        while self._stale:
            self._renew(self._stale.pop())
        if self._unsorted:
            self._sort()
        return self._view

    def _renew(self, name: str) -> None:
        state, old = self.states[name], self._loads[name]
        new = self._loads[name] = state.load()
        if new.healthy != old.healthy:
            self._unsorted = True
        elif state.has_room != (name in self._roomy):
            self._count_room(state)

    def _count_room(self, state: WorkerState) -> None:
        name, step = state.worker.name, 1 if state.has_room else -1
        for role in PHASES:
            if state.worker.role.serves(role):
                self._room[role] += step
        if step > 0:
            self._roomy.add(name)
        else:
            self._roomy.discard(name)

    def _sort(self) -> None:
        """Make the lists of healthy workers anew: when one falls ill or recovers, not before."""
        self._unsorted = False
        self._room.update(dict.fromkeys(PHASES, 0))
        self._roomy.clear()
        healthy = [w for w in self.workers if self.states[w.name].healthy]
        for role in PHASES:
            self._ready[role] = tuple(w for w in healthy if w.role.serves(role))
        for worker in healthy:
            if self.states[worker.name].has_room:
                self._count_room(self.states[worker.name])

    def view_for(self, model: str, *, without: Iterable[str] = ()) -> FleetView:
        """Return the fleet as far as it serves ``model``: not every engine refuses another name.

        Workers share the fleet's model; an adapter of it may be on some of them only.
        """
        out = list(without)
        if model != self.model():
            known = (name for name, state in self.states.items() if state.models)
            out += [name for name in known if model not in self.states[name].models]
        view = self.view()
        if not out:
            return view
        loads = {**view.loads, **dict.fromkeys(out, WorkerLoad(healthy=False))}
        return FleetView(self.workers, loads, self._pairs)

    def begin(self, name: str, work: Work) -> None:
        """A request is given to a worker."""
        state = self.states[name]
        state.requests += 1
        state.output_tokens += work.output_tokens
        state.kv_tokens += work.context_tokens + work.output_tokens
        if work.prompt_tokens:
            state.prompt_tokens += work.prompt_tokens
            state.prefills += 1
        self._stale.add(name)

    def prompt_read(self, name: str, work: Work) -> Work:
        """The worker has read the prompt; returns the work that is left."""
        if work.prompt_tokens:
            state = self.states[name]
            state.prompt_tokens -= work.prompt_tokens
            state.prefills -= 1
            self._stale.add(name)
        return replace(work, prompt_tokens=0)

    def end(self, name: str, work: Work) -> None:
        """The request left the worker; ``work`` as ``begin`` or ``prompt_read`` left it."""
        self.prompt_read(name, work)
        state = self.states[name]
        state.requests -= 1
        state.output_tokens -= work.output_tokens
        state.kv_tokens -= work.context_tokens + work.output_tokens
        self._stale.add(name)

    def wrote(self, record: RequestRecord) -> None:
        """A request ended: count its tokens where they were written.

        A stream without usage counts as many tokens as it had pieces.
        """
        state = self.states.get(record.decode)
        if state is not None:
            state.tokens_written += record.output_tokens or len(record.gaps_s or ()) + 1

    def succeeded(self, name: str) -> None:
        """The worker did its part of a request."""
        state = self.states[name]
        state.served += 1
        state.failures = 0

    def failed(self, name: str, kind: str, detail: str) -> None:
        """The worker failed a request."""
        state = self.states[name]
        if kind in state.failed or len(state.failed) < MAX_KINDS:
            state.failed[kind] = state.failed.get(kind, 0) + 1
        state.last_problem = f"{kind}: {detail}"
        if not NOT_SICK.fullmatch(kind):
            self._failure(state, kind, detail)

    def probe_failed(self, name: str, kind: str, detail: str) -> None:
        """A health probe failed."""
        self._failure(self.states[name], kind, detail)

    def _failure(self, state: WorkerState, kind: str, detail: str) -> None:
        state.failures += 1
        if state.failures >= self._unhealthy_after or kind in ("refused", "unreachable"):
            state.healthy = False
            state.reason = f"{kind}: {detail}"
        self._stale.add(state.worker.name)

    def probe_ok(self, name: str, models: tuple[str, ...]) -> None:
        """A probe succeeded; the worker serves ``models``."""
        state = self.states[name]
        state.models = models
        expected = self.model()
        if expected is not None and expected not in models:
            state.healthy = False
            state.reason = (
                f"two models in one fleet: {name} serves {', '.join(models) or 'nothing'}, the "
                f"fleet serves {expected}"
            )
        else:
            state.healthy = True
            state.reason = ""
            state.failures = 0
        self._stale.add(name)

    def model(self) -> str | None:
        """Return the model of the fleet: the policy's, else the first worker's in file order."""
        if self._model is not None:
            return self._model
        for worker in self.workers:
            models = self.states[worker.name].models
            if models:
                return models[0]
        return None

    def knows_model(self, name: str) -> bool:
        """Return whether some healthy worker serves ``name`` (or nothing is known yet)."""
        if name == self._model:
            return True
        known = [s.models for s in self.states.values() if s.models and s.healthy]
        return not known or any(name in models for models in known)

    def served_models(self) -> list[str]:
        """Return the models of the healthy workers, in file order, each once."""
        models = [m for s in self.states.values() if s.healthy for m in s.models]
        return list(dict.fromkeys(models))

    def greet(self, name: str, hello: Mapping[str, object]) -> bool:
        """Keep what a worker says of itself; False when no worker has that name."""
        state = self.states.get(name)
        if state is None:
            return False
        state.hello = hello
        rank, endpoint = hello.get("tp_rank"), hello.get("endpoint")
        if isinstance(rank, int) and 0 <= rank < MAX_RANKS and isinstance(endpoint, dict):
            state.endpoints[rank] = endpoint
        self._pairs.changed(state.worker)
        return True

    def _kind(self, worker: Worker) -> object:
        """Return what decides with whom a worker can share handoffs (see ``_pair_problem``)."""
        hello = self.states[worker.name].hello
        said = None if hello is None else tuple(str(hello.get(key)) for key, _, _ in MUST_AGREE)
        located = bool(self.endpoints(worker.name))
        return worker.engine, worker.role, worker.handoffs, located, said

    def endpoints(self, name: str) -> tuple[Mapping[str, object], ...]:
        """Return where the ranks of a worker serve KV, in order; empty until all have said so."""
        state = self.states[name]
        size = (state.hello or {}).get("tp_size")
        if not isinstance(size, int) or not all(r in state.endpoints for r in range(size)):
            return ()
        return tuple(state.endpoints[r] for r in range(size))

    def family(self, prefill: Worker, decode: Worker) -> Family:
        """Return how these two meet."""
        return pair_family(self.dialects[prefill.engine], self.dialects[decode.engine])

    def _pair_problem(self, prefill: Worker, decode: Worker) -> str | None:
        if not _are_pair(prefill, decode):
            return None
        dialects = self.dialects.get(prefill.engine), self.dialects.get(decode.engine)
        if dialects[0] is None or dialects[1] is None:
            return "no dialect is installed for the engine of one of the two workers"
        if not tells_endpoints(dialects[0], dialects[1]) and not self.endpoints(prefill.name):
            return (
                f"prefill worker {prefill.name} has not said yet where it serves KV: its adapter "
                "is not loaded, its name or secret differ, or it cannot reach this gateway"
            )
        ours, theirs = (self.states[w.name].hello for w in (prefill, decode))
        if ours is None or theirs is None:
            return None
        for key, what, fix in MUST_AGREE:
            a, b = ours.get(key), theirs.get(key)
            if a is not None and b is not None and a != b:
                differing = _differing(ours.get("model"), theirs.get("model"), key)
                return f"{what} {prefill.name} has {a}, {decode.name} has {b}{differing}; {fix}"
        return None

    def problems(self) -> list[str]:
        """Return what keeps pairs from splitting, one line each, each once."""
        return list(self._pairs.texts())

    def alike(self, view: FleetView, why: str) -> FleetView:
        """Return ``view`` with one more problem, ``why``, between workers of unlike engines."""
        return replace(view, pair_problems=Across(view.pair_problems, self._names, why))

    def ready(self) -> dict[str, bool]:
        """Return for each role of the policy whether a healthy worker serves it."""
        roles = {Role.DECODE} | {
            r for r in (Role.PREFILL,) for w in self.workers if w.role.serves(r)
        }
        return {str(role): bool(self.view().serving(role)) for role in sorted(roles)}


def expected_output(bound: int | None) -> int:
    """Return the output tokens to expect of a request with this bound, or with none."""
    if bound is None:
        return EXPECTED_OUTPUT_TOKENS
    return min(max(0, bound), MOST_EXPECTED_TOKENS)


def _are_pair(prefill: Worker, decode: Worker) -> bool:
    """Return whether the policy means these two to share handoffs."""
    return (
        prefill.name != decode.name
        and prefill.handoffs
        and decode.handoffs
        and prefill.role.serves(Role.PREFILL)
        and decode.role.serves(Role.DECODE)
    )


def _differing(ours: object, theirs: object, key: str) -> str:
    """Return which fields of two fingerprints differ, where both workers tell them."""
    if key != "fingerprint" or not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    fields = [k for k in ours if ours[k] != theirs.get(k)]
    return "".join(f" ({k} {ours[k]!r:.200} and {theirs.get(k)!r:.200})" for k in fields)


def _with_dialect(worker: Worker, dialect: Dialect | None) -> Worker:
    """Return ``worker`` as its engine makes it: able to serve alone, to take handoffs, or both."""
    if dialect is None or dialect.decode_is_whole:
        return worker
    if worker.role is Role.BOTH:
        return replace(worker, handoffs=False)
    return replace(worker, whole=False)
