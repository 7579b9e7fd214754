"""What the gateway knows of its workers, and what follows from it (sans-IO).

A worker is healthy once a probe succeeded; ``unhealthy_after`` failures in a row, or a refused
connection, take it out until a probe succeeds again. Then it is on trial until it has served a
request. A worker that serves another model than its fleet stays out, with the reason told. Where
every worker that could do the work of a role is ill, the least bad one that still answers its
health probe is kept in use: slow or failing is better than nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from disagg_plugins.gateway.dialect import (
    Dialect,
    announcing,
    pair_family,
    tells_endpoints,
)
from disagg_plugins.gateway.pairs import Across, PairProblems, own_means, own_transport
from disagg_plugins.gateway.role_lists import PHASES, RoleLists
from disagg_plugins.gateway.worker_state import GONE, NOT_SICK, Work, WorkerState
from disagg_plugins.types import IDLE, Family, FleetIndex, FleetView, Role, Worker, WorkerLoad

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord

LEFT_REMEMBERED = 1024
"""Workers that left whose processes are told from those of a later worker of the same name."""

MOST_KV_TOKENS = 1 << 40
"""No worker holds more; a larger number in a hello is a mistake."""

MAX_RANKS = 256
"""As many as ``handoff.endpoints`` takes of one worker."""


LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""Of a host's name (RFC 1123)."""

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
        self.dialects = dialects
        self.states: dict[str, WorkerState] = {}
        self._model = model
        self._unhealthy_after = unhealthy_after
        self._names: dict[str, Worker] = {}
        self._loads: dict[str, WorkerLoad] = {}
        self.on_freed: Callable[[str], object] = bool  # called when a worker may take more
        self._stale: set[str] = set()  # loads to be made anew when somebody looks
        self._lists = RoleLists()
        self._joined = 0  # workers that ever joined
        self._left: dict[str, tuple[str, list[Mapping[str, object]]]] = {}
        self._kept: set[str] = set()
        self._dependent = 0  # workers that take handed-over requests only
        self._ailing = False  # the health of some worker changed, so who is kept may change
        self._pairs = PairProblems(self._names, self._pair_problem, self._kind)
        self._view: FleetView | None = None  # None: to be made anew, the workers changed
        self._spoken: tuple[FleetView | None, tuple[Dialect, ...]] = None, ()
        for worker in workers:
            self.add(worker)

    # Who belongs to it

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Return the workers as they are used now, in the order of joining."""
        return tuple(self._names.values())

    def add(self, worker: Worker) -> WorkerState:
        """A worker joins; it takes requests once a probe succeeded.

        Raises:
            ValueError: There is one of that name.
        """
        if worker.name in self.states:
            raise ValueError(f"there is a worker {worker.name!r} already")
        used = as_used(worker, self.dialects.get(worker.engine))
        state = WorkerState(used, worker, self._joined)
        state.role_known = not used.role_switch
        self._joined += 1
        self.states[worker.name] = state
        self._loads[worker.name] = state.load()
        self._use(state, used)
        return state

    def remove(self, name: str) -> None:
        """A worker leaves, whatever it still has; what is heard of it later has no effect.

        Raises:
            KeyError: There is no such worker.
        """
        state = self.states.pop(name)
        self._left.pop(name, None)
        if state.endpoints:
            self._left[name] = (state.worker.url, list(state.endpoints.values()))
            if len(self._left) > LEFT_REMEMBERED:
                del self._left[next(iter(self._left))]
        self._dependent -= not state.worker.whole
        self._stale.discard(name)
        self._kept.discard(name)
        self._lists.take(name)
        self._pairs.gone(name)
        del self._names[name], self._loads[name]
        self._view = None
        self._ailing = True

    def change(self, name: str, declared: Worker) -> None:
        """A worker is described anew: same address, engine and role, other numbers or labels."""
        state = self.states[name]
        state.declared = declared
        self._use(
            state,
            replace(
                state.worker,
                capacity=declared.capacity,
                labels=declared.labels,
                kv_tokens=_room(declared, state.hello),
            ),
        )

    def set_role(self, name: str, role: Role) -> None:
        """A worker is used for ``role`` from now on."""
        state = self.states[name]
        self._use(state, in_role(state.worker, role, self.dialects.get(state.worker.engine)))

    def drain(self, name: str, draining: bool = True) -> None:
        """A worker takes nothing new, or takes requests again."""
        self.states[name].draining = draining
        self._stale.add(name)
        self._ailing = True

    def _use(self, state: WorkerState, worker: Worker) -> None:
        name = worker.name
        known = self._names.get(name)
        self._dependent += (not worker.whole) - (known is not None and not known.whole)
        state.worker = self._names[name] = worker
        self._pairs.changed(worker)
        self._stale.add(name)
        self._view = None
        self._ailing = True

    # What the scheduler sees

    def view(self) -> FleetView:
        """Return the fleet as the scheduler sees it now; the next call brings it up to date.

        Another object is returned when workers joined, left or changed.
        """
        while self._stale:
            self._renew(self._stale.pop())
        if self._ailing or self._lists.changed:
            self._care()
        if self._view is None:
            index = FleetIndex(self._lists.ready, self._names, self._lists.room)
            self._view = FleetView(self.workers, self._loads, self._pairs, index)
        return self._view

    def load(self, name: str) -> WorkerLoad:
        """Return the load of one worker now; of one that has left, none."""
        state = self.states.get(name)
        return IDLE if state is None else state.load()

    def _renew(self, name: str) -> None:
        state = self.states[name]
        load = self._loads[name] = state.load()
        if load.healthy:
            has_room, trial = state.has_room, state.trial
            self._lists.put(state.order, state.worker, has_room=has_room, trial=trial)
        else:
            self._lists.take(name)

    def _care(self) -> None:
        """Decide who is kept though ill, and who needs no trial because nobody else is there."""
        self._ailing = False
        for name in [n for n in self._kept if not self._is_needed(self.states[n])]:
            self._keep(name, False)
        for role in self._roles_needed():
            if not self._lists.now(role):
                ill = [s for s in self.states.values() if _could_do(s, role)]
                if ill:
                    self._keep(min(ill, key=lambda s: (s.failures, s.order)).worker.name, True)
        for role in tuple(self._lists.changed):
            listed = self._lists.now(role)
            if len(listed) == self._lists.tried[role]:
                for worker in tuple(listed):
                    self.states[worker.name].trial = False
                    self._renew(worker.name)
        self._lists.settle()

    def _roles_needed(self) -> tuple[Role, ...]:
        """Return the roles without which requests fail; most decode workers can do without."""
        return PHASES if self._dependent else (Role.DECODE,)

    def _is_needed(self, state: WorkerState) -> bool:
        """Return whether a worker that is ill has to stay in use."""
        return any(
            _could_do(state, role) and all(self.states[w.name].kept for w in self._lists.now(role))
            for role in self._roles_needed()
        )

    def _keep(self, name: str, kept: bool) -> None:
        self.states[name].kept = kept
        (self._kept.add if kept else self._kept.discard)(name)
        self._renew(name)

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

    # What becomes of requests

    def begin(self, name: str, work: Work) -> Work:
        """A request is given to a worker; returns what to end with."""
        state = self.states.get(name)
        if state is None:
            return work
        state.requests += 1
        state.output_tokens += work.output_tokens
        state.kv_tokens += work.context_tokens + work.output_tokens
        if work.prompt_tokens:
            state.prompt_tokens += work.prompt_tokens
            state.prefills += 1
        self._stale.add(name)
        return Work(work.prompt_tokens, work.context_tokens, work.output_tokens, state.order)

    def _given(self, name: str, work: Work) -> WorkerState | None:
        """Return the worker that has ``work``, or None if it has left."""
        state = self.states.get(name)
        if state is None or work.given_to not in (None, state.order):
            return None
        return state

    def prompt_read(self, name: str, work: Work) -> Work:
        """The worker has read the prompt; returns the work that is left."""
        state = self._given(name, work)
        if state is not None:
            state.signs += 1
        return self._prompt_over(name, work)

    def _prompt_over(self, name: str, work: Work) -> Work:
        if not work.prompt_tokens:
            return work
        state = self._given(name, work)
        if state is not None:
            state.prompt_tokens -= work.prompt_tokens
            state.prefills -= 1
            self._stale.add(name)
            self.on_freed(name)
        return replace(work, prompt_tokens=0)

    def end(self, name: str, work: Work) -> None:
        """The request left the worker; ``work`` as ``begin`` or ``prompt_read`` left it."""
        self._prompt_over(name, work)
        state = self._given(name, work)
        if state is None:
            return
        state.requests -= 1
        state.output_tokens -= work.output_tokens
        state.kv_tokens -= work.context_tokens + work.output_tokens
        self._stale.add(name)
        self.on_freed(name)

    def wrote(self, record: RequestRecord) -> None:
        """A request ended: count its tokens where they were written.

        A stream without usage counts as many tokens as it had pieces.
        """
        writer = record.prefill if record.ended_by_prefill else record.decode
        state = self.states.get(writer or "")
        if state is not None:
            state.tokens_written += record.output_tokens or len(record.gaps_s or ()) + 1

    def succeeded(self, name: str) -> None:
        """The worker did its part of a request."""
        state = self.states.get(name)
        if state is not None:
            state.succeeded()
            self._stale.add(name)

    def failed(self, name: str, kind: str, detail: str) -> None:
        """The worker failed a request."""
        state = self.states.get(name)
        if state is None:
            return
        state.count_failure(kind, detail)
        if not NOT_SICK.fullmatch(kind):
            self._failure(state, kind, detail)

    def slow(self, name: str, detail: str) -> None:
        """The worker is far slower than its peers: it rests, and comes back on trial."""
        state = self.states[name]
        state.last_problem = detail
        state.out_for_slowness(detail)
        self._stale.add(name)
        self._ailing = True

    # What probes find

    def probe_failed(self, name: str, kind: str, detail: str, *, reachable: bool = False) -> None:
        """A health probe failed; ``reachable``: the server answered, but its engine did not."""
        state = self.states[name]
        state.reachable = reachable
        self._failure(state, kind, detail)

    def _failure(self, state: WorkerState, kind: str, detail: str) -> None:
        state.failures += 1
        if kind in GONE:
            state.reachable = False
            state.role_known = not state.worker.role_switch
        if state.failures >= self._unhealthy_after or kind in GONE:
            state.out(f"{kind}: {detail}")
        self._stale.add(state.worker.name)
        self._ailing = True

    def probe_ok(self, name: str, models: tuple[str, ...]) -> None:
        """A probe succeeded; the worker serves ``models``."""
        state = self.states[name]
        was = state.healthy, state.kept
        state.models = models
        expected = self.model()
        if expected is not None and expected not in models:
            state.reachable = False
            state.out(
                f"two models in one fleet: {name} serves {', '.join(models) or 'nothing'}, the "
                f"fleet serves {expected}"
            )
        else:
            state.back()
        self._stale.add(name)
        self._ailing = self._ailing or was != (state.healthy, False)

    def switching(self, name: str) -> None:
        """The server of a worker is told to take another role: what it said is void."""
        state = self.states[name]
        state.unheard()
        state.switching = True
        self._pairs.changed(state.worker)

    def role_is(self, name: str, known: bool, reason: str = "") -> None:
        """The server of a worker said that it is in its role; or nobody knows: it rests."""
        state = self.states[name]
        state.role_known = known
        state.switching = False
        if not known:
            state.reachable = False
            state.out(reason)
        self._stale.add(name)
        self._ailing = True

    def dialects_here(self) -> tuple[Dialect, ...]:
        """Return the dialects of the fleet's engines; made anew when its workers change."""
        view = self.view()
        if view is not self._spoken[0]:
            engines = {worker.engine for worker in view.workers}
            spoken = tuple(d for name, d in self.dialects.items() if name in engines)
            self._spoken = view, spoken
        return self._spoken[1]

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
        unknown = True
        for state in self.states.values():
            if state.models and state.healthy:
                if name in state.models:
                    return True
                unknown = False
        return unknown

    def served_models(self) -> list[str]:
        """Return the models of the healthy workers, in file order, each once."""
        models = [m for s in self.states.values() if s.healthy for m in s.models]
        return list(dict.fromkeys(models))

    def greet(self, name: str, hello: Mapping[str, object]) -> bool:
        """Keep what a worker says of itself; False when no worker has that name."""
        state = self.states.get(name)
        if state is None:
            return False
        if (address := hello.get("announce")) is not None:
            return self._announces(state, address)
        rank, endpoint = hello.get("tp_rank"), hello.get("endpoint")
        url, before = self._left.get(name, ("", []))
        if endpoint in before and url != state.worker.url:
            return False  # said by the process of a worker that had this name before
        state.hello = hello
        room = _room(state.declared, hello)
        if room != state.worker.kv_tokens:
            self._use(state, replace(state.worker, kv_tokens=room))
        if isinstance(rank, int) and 0 <= rank < MAX_RANKS and isinstance(endpoint, dict):
            state.endpoints[rank] = endpoint
        self._pairs.changed(state.worker)
        return True

    def _announces(self, state: WorkerState, address: object) -> bool:
        """Keep where a worker's adapter hears announcements."""
        if not isinstance(address, str) or not _is_address(address):
            return False
        if address != state.announce:
            state.announce = address
            self._pairs.changed(state.worker)
        return True

    def announce_address(self, name: str) -> str:
        """Return where a worker's adapter hears announcements; empty where it has not said so."""
        state = self.states.get(name)
        return "" if state is None else state.announce

    def _kind(self, worker: Worker) -> object:
        """Return what decides with whom a worker can share handoffs (see ``_pair_problem``)."""
        hello = self.states[worker.name].hello
        said = None if hello is None else tuple(str(hello.get(key)) for key, _, _ in MUST_AGREE)
        located = bool(self.endpoints(worker.name))
        heard = bool(self.states[worker.name].announce)
        return worker.engine, worker.role, worker.handoffs, located, heard, said

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

    def observed(self, prefill: Worker) -> bool:
        """Return whether workers report of the handoffs that ``prefill`` begins."""
        return not own_transport(self.dialects[prefill.engine])

    def _pair_problem(self, prefill: Worker, decode: Worker) -> str | None:
        if not are_pair(prefill, decode):
            return None
        dialects = self.dialects.get(prefill.engine), self.dialects.get(decode.engine)
        if dialects[0] is None or dialects[1] is None:
            return "no dialect is installed for the engine of one of the two workers"
        if (apart := own_means(prefill, decode, self.dialects)) is not None:
            return apart
        if not tells_endpoints(dialects[0], dialects[1]) and not self.endpoints(prefill.name):
            return (
                f"prefill worker {prefill.name} has not said yet where it serves KV: its adapter "
                "is not loaded, its name or secret differ, or it cannot reach this gateway"
            )
        for worker, dialect in ((prefill, dialects[0]), (decode, dialects[1])):
            if announcing(dialect) is not None and not self.states[worker.name].announce:
                return (
                    f"worker {worker.name} has not said yet where it hears of handoffs: its "
                    "adapter is not loaded, its name or secret differ, or it cannot reach this "
                    "gateway"
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


def are_pair(prefill: Worker, decode: Worker) -> bool:
    """Return whether the policy means these two to share handoffs."""
    return (
        prefill.name != decode.name
        and prefill.handoffs
        and decode.handoffs
        and prefill.role.serves(Role.PREFILL)
        and decode.role.serves(Role.DECODE)
    )


def _is_address(text: str) -> bool:
    """Return whether a text is ``host:port``, as an adapter names where it listens."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 1 << 16:
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            return bool(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            return False
    return len(host) <= 253 and all(LABEL.fullmatch(label) for label in host.split("."))


def _differing(ours: object, theirs: object, key: str) -> str:
    """Return which fields of two fingerprints differ, where both workers tell them."""
    if key != "fingerprint" or not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    fields = [k for k in ours if ours[k] != theirs.get(k)]
    return "".join(f" ({k} {ours[k]!r:.200} and {theirs.get(k)!r:.200})" for k in fields)


def _room(declared: Worker, hello: Mapping[str, object] | None) -> int | None:
    """Return the KV tokens that a worker holds: as the policy says, else as it said itself."""
    said = None if hello is None else hello.get("kv_tokens")
    if declared.kv_tokens is not None or type(said) is not int:
        return declared.kv_tokens
    return said if 0 < said <= MOST_KV_TOKENS else None


def _could_do(state: WorkerState, role: Role) -> bool:
    """Return whether a worker that is ill still answers and could do the work of ``role``."""
    able = state.reachable and not state.healthy and not state.draining
    return able and state.worker.role.serves(role)


def as_used(worker: Worker, dialect: Dialect | None) -> Worker:
    """Return ``worker`` as its engine makes it: able to serve alone, to take handoffs, or both.

    An engine without a mode for both phases begins as a decode worker where its role can be
    switched, and takes no part in handoffs where it cannot.
    """
    whole = dialect is None or dialect.decode_is_whole
    movable = worker.role is Role.BOTH and (whole or worker.role_switch)
    worker = replace(worker, movable=movable, role_switch=movable and not whole)
    return in_role(worker, Role.DECODE if worker.role_switch else worker.role, dialect)


def in_role(worker: Worker, role: Role, dialect: Dialect | None) -> Worker:
    """Return ``worker`` in ``role``, as its engine makes it there."""
    if dialect is None or dialect.decode_is_whole:
        return replace(worker, role=role)
    both = role is Role.BOTH
    return replace(worker, role=role, whole=both, handoffs=not both)
