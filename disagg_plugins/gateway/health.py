"""Health probes: is each worker alive, and which model does it serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.errors import TransportError
from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import Header, get

if TYPE_CHECKING:
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.types import Worker

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 1 << 20
MAX_MODELS = 1024


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
    listener = _Fetch()
    call = Call("probe", get(path, pool.host_header), listener)
    pool.submit(call)
    try:
        async with asyncio.timeout(timeout_s):
            return await listener.done
    except TimeoutError as exc:
        raise TransportError(
            "timeout", f"no answer to GET {path.decode()} within {timeout_s:g} s"
        ) from exc
    finally:
        if not call.ended:
            call.cancel()


class Prober:
    """Asks every worker for its health and its models, again and again.

    Args:
        fleet: Is told what was found.
        pools: Connections by worker name.
        probe_s: Time between rounds.
        timeout_s: Bound on one question.
    """

    def __init__(
        self,
        fleet: FleetState,
        pools: Mapping[str, WorkerPool],
        *,
        probe_s: float,
        timeout_s: float,
    ) -> None:
        self._fleet = fleet
        self._pools = pools
        self._probe_s = probe_s
        self._timeout_s = timeout_s
        self.cards: dict[str, object] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Probe until cancelled; each worker at its own pace: a slow one delays no other."""
        async with asyncio.TaskGroup() as tasks:
            self.tasks = [tasks.create_task(self._watch(w)) for w in self._fleet.workers]

    async def _watch(self, worker: Worker) -> None:
        while True:
            await self.probe(worker)
            await asyncio.sleep(self._probe_s)

    async def probe(self, worker: Worker) -> None:
        """Probe one worker once."""
        state = self._fleet.states[worker.name]
        before = (state.healthy, state.reason)
        try:
            models = await self._models(worker)
        except TransportError as exc:
            self._fleet.probe_failed(worker.name, exc.transport, exc.problem)
        else:
            self._fleet.probe_ok(worker.name, models)
        if (state.healthy, state.reason) != before:
            said = "is healthy" if state.healthy else f"is not healthy: {state.reason}"
            log.warning("worker %s %s", worker.name, said)

    async def _models(self, worker: Worker) -> tuple[str, ...]:
        pool = self._pools[worker.name]
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
