"""Health probes: is each worker alive, which model does it serve, and can its engine generate.

A server often answers ``/health`` though its engine is dead. So a worker that gave no sign of life
for ``gateway.probe_generate_s``, or that failed, is asked for one token. One that falls ill again
soon after it came back rests longer each time.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.errors import TransportError
from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import Header, get, post
from disagg_plugins.gateway.worker_state import rest_of

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.worker_state import WorkerState
    from disagg_plugins.policy import GatewayPolicy
    from disagg_plugins.types import Role, Worker

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 20
MAX_MODELS = 1024

JITTER = 0.1
"""Share by which the times between probes differ, so that workers are not probed in step."""

GENERATE_JITTER = 0.25
"""The same for questions that cost the engine a step."""

ONE_TOKEN = {"prompt": "1", "max_tokens": 1, "temperature": 0, "stream": False}
GENERATE = b"/v1/completions"
GENERATE_LINES = b"content-type: application/json\r\nx-request-id: disagg-probe\r\n"


class _Fetch:
    """Listens to one small call and resolves a future."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body: list[bytes] = []
        self._left_bytes = MAX_ANSWER_BYTES

    def call_head(self, call: Call, status: int, headers: list[Header]) -> None:
        self._status = status

    def call_data(self, call: Call, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            call.cancel()
            self.call_failed(call, "garbage", f"its answer exceeds {MAX_ANSWER_BYTES} bytes")
            return
        self._body.append(data)

    def call_end(self, call: Call) -> None:
        if not self.done.done():
            self.done.set_result((self._status, b"".join(self._body)))

    def call_failed(self, call: Call, kind: str, detail: str) -> None:
        if not self.done.done():
            self.done.set_exception(TransportError(kind, detail))


async def fetch(pool: WorkerPool, path: bytes, *, timeout_s: float) -> tuple[int, bytes]:
    """GET ``path`` of a worker; return status and body.

    Raises:
        TransportError: No complete answer within the time; ``transport`` is the kind of failure.
    """
    return await _ask(pool, get(path, pool.host_header), b"GET " + path, timeout_s)


async def send(
    pool: WorkerPool, path: bytes, body: object, *, timeout_s: float
) -> tuple[int, bytes]:
    """POST ``body`` as JSON to ``path`` of a worker; return status and body.

    Raises:
        TransportError: See ``fetch``.
    """
    payload = post(path, pool.host_header, GENERATE_LINES, msgspec.json.encode(body))
    return await _ask(pool, payload, b"POST " + path, timeout_s)


async def _ask(
    pool: WorkerPool, payload: bytes, what: bytes, timeout_s: float
) -> tuple[int, bytes]:
    listener = _Fetch()
    call = Call("probe", payload, listener)
    pool.submit(call)
    try:
        async with asyncio.timeout(timeout_s):
            return await listener.done
    except TimeoutError as exc:
        raise TransportError(
            "timeout", f"no answer to {what.decode()} within {timeout_s:g} s"
        ) from exc
    finally:
        if not call.ended:
            call.cancel()


@dataclass(slots=True)
class _Seen:
    """What the prober remembers of one worker between two probes."""

    outs: int = 0
    signs: int = 0
    quiet_since_s: float = 0.0
    wait_s: float = 0.0


class Prober:
    """Asks every worker for its health and its models, again and again.

    Args:
        fleet: Is told what was found.
        pools: Connections by worker name.
        policy: How often, and how long to wait.
        switch_s: Bound on a server that switches its role.
    """

    def __init__(
        self,
        fleet: FleetState,
        pools: Mapping[str, WorkerPool],
        policy: GatewayPolicy,
        *,
        switch_s: float,
    ) -> None:
        self._fleet = fleet
        self._pools = pools
        self._policy = policy
        self._switch_s = switch_s
        self._timeout_s = max(policy.connect_s, policy.probe_s)
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiting: list[str] = []  # workers to be probed once it runs
        self.cards: dict[str, object] = {}

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Return the running probes, one a worker."""
        return list(self._tasks.values())

    async def run(self) -> None:
        """Probe until cancelled; each worker at its own pace: a slow one delays no other."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for name in self._waiting:
                self.watch(name)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._group = None

    def watch(self, name: str) -> None:
        """Probe a worker that joined, from now on."""
        if self._group is None:
            self._waiting.append(name)
            return
        state = self._fleet.states.get(name)
        if state is not None and name not in self._tasks:
            self._tasks[name] = self._group.create_task(self._watch(state))

    def forget(self, name: str) -> None:
        """Probe a worker no more: it leaves."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    def _is_here(self, state: WorkerState) -> bool:
        return self._fleet.states.get(state.worker.name) is state

    async def _watch(self, state: WorkerState) -> None:
        seen = _Seen(signs=state.signs, quiet_since_s=_now_s())
        seen.wait_s = _about(self._policy.probe_generate_s or 0.0, GENERATE_JITTER)
        while self._is_here(state):
            if state.outs != seen.outs:
                seen.outs = state.outs
                policy = self._policy
                await asyncio.sleep(rest_of(state.relapses, policy.rest_s, policy.rest_max_s))
            await self.probe(state, seen)
            await asyncio.sleep(_about(self._policy.probe_s, JITTER))

    async def probe(self, state: WorkerState, seen: _Seen) -> None:
        """Probe one worker once."""
        name = state.worker.name
        before, outs = (state.healthy, state.reason), state.outs
        pool = self._pools[name]
        try:
            models = await self._models(pool)
        except TransportError as exc:
            if self._is_here(state):
                self._fleet.probe_failed(name, exc.transport, exc.problem)
        else:
            if self._is_here(state) and await self._can_serve(state, seen, pool, models):
                if state.outs == outs:  # else it was taken out meanwhile, and rests first
                    self._fleet.probe_ok(name, models)
        if self._is_here(state) and (state.healthy, state.reason) != before:
            if state.healthy:
                log.info("worker %s is healthy", name)
            else:
                log.warning("worker %s is not healthy: %s", name, state.reason)

    async def _can_serve(
        self, state: WorkerState, seen: _Seen, pool: WorkerPool, models: tuple[str, ...]
    ) -> bool:
        """Return whether the engine behind a server that answers does its work."""
        name = state.worker.name
        if state.switching:
            return False  # nothing can be said now
        try:
            if not state.role_known:
                await self.take_role(pool, state.worker, state.worker.role)
                if self._is_here(state):
                    self._fleet.role_is(name, True)
            if self._is_due(state, seen):
                await self._generate(pool, models)
                state.signs += 1
                _heard(seen, state, self._policy.probe_generate_s)
        except TransportError as exc:
            if self._is_here(state):
                self._fleet.probe_failed(name, exc.transport, exc.problem, reachable=True)
            return False
        return self._is_here(state)

    def _is_due(self, state: WorkerState, seen: _Seen) -> bool:
        """Return whether a worker is to be asked for a token: it is silent, or it failed."""
        every_s = self._policy.probe_generate_s
        if every_s is None or not state.worker.whole:
            return False
        if state.signs != seen.signs and not state.failures:
            _heard(seen, state, every_s)
        return bool(state.failures) or _now_s() >= seen.quiet_since_s + seen.wait_s

    async def _generate(self, pool: WorkerPool, models: tuple[str, ...]) -> None:
        """Ask for one token.

        Raises:
            TransportError: None came. A refusal (4xx) is an answer: the engine has no such API.
        """
        body = {"model": models[0] if models else "", **ONE_TOKEN}
        timeout_s = self._policy.probe_generate_timeout_s
        status, answer = await send(pool, GENERATE, body, timeout_s=timeout_s)
        if status >= 500:
            raise TransportError(f"http_{status}", f"a probe for one token was answered {status}")
        if status == 200 and not answer.lstrip().startswith(b"{"):
            raise TransportError("garbage", "a probe for one token was answered with no JSON")

    async def take_role(self, pool: WorkerPool, worker: Worker, role: Role) -> None:
        """Have the server of a worker take a role, which it may have already.

        Raises:
            TransportError: It did not; the kind ``role`` means that it said so.
        """
        dialect = self._fleet.dialects.get(worker.engine)
        tell = getattr(dialect, "role_switch", None)  # a dialect of another package may lack it
        asked: tuple[str, Body] | None = None if tell is None else tell(role)
        if asked is None:
            raise TransportError("role", f"no server of {worker.engine} can be told its role")
        path, body = asked
        status, answer = await send(pool, path.encode("ascii"), body, timeout_s=self._switch_s)
        if status != 200:
            raise TransportError("role", f"POST {path} answered {status}: {_said(answer)}")

    async def _models(self, pool: WorkerPool) -> tuple[str, ...]:
        status, _ = await fetch(pool, b"/health", timeout_s=self._timeout_s)
        if status != 200:
            raise TransportError(f"http_{status}", f"GET /health answered {status}")
        status, body = await fetch(pool, b"/v1/models", timeout_s=self._timeout_s)
        if status != 200:
            raise TransportError(f"http_{status}", f"GET /v1/models answered {status}")
        return self._read_models(body)

    def _read_models(self, body: bytes) -> tuple[str, ...]:
        try:
            answer = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise TransportError("garbage", f"GET /v1/models answered no JSON: {exc}") from exc
        data = answer.get("data") if isinstance(answer, dict) else None
        cards = [c for c in data if isinstance(c, dict)] if isinstance(data, list) else []
        found = {str(c["id"]): c for c in cards[:MAX_MODELS] if isinstance(c.get("id"), str)}
        if len(self.cards) <= MAX_MODELS:
            self.cards.update(found)
        return tuple(found)


def _heard(seen: _Seen, state: WorkerState, every_s: float | None) -> None:
    """Note a sign of life: the next question is due after another interval."""
    seen.signs = state.signs
    seen.quiet_since_s = _now_s()
    seen.wait_s = _about(every_s or 0.0, GENERATE_JITTER)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _about(seconds: float, share: float) -> float:
    """Return a time that differs from ``seconds`` by up to that share."""
    return seconds * random.uniform(1 - share, 1 + share)


def _said(answer: bytes) -> str:
    """Return the message of a JSON answer, or the start of any other."""
    try:
        said = msgspec.json.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return answer[:200].decode("utf-8", "replace")
    message = said.get("message") if isinstance(said, dict) else None
    return str(message or said)[:200]
