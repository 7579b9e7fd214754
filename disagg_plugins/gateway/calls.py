"""The calls of one request to workers: each is made, counted and ended here."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from disagg_plugins.gateway.announcing import AnnouncedBody, AnnouncedCall
from disagg_plugins.gateway.claims import EXPECTED, Claims
from disagg_plugins.gateway.heard import Heard
from disagg_plugins.gateway.surroundings import Surroundings
from disagg_plugins.gateway.upstream import Call
from disagg_plugins.gateway.wire import post

if TYPE_CHECKING:
    from disagg_plugins.gateway.hedge import Hedge
    from disagg_plugins.gateway.pool import WorkerPool
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.timeline import Timeline
    from disagg_plugins.gateway.upstream import CallListener
    from disagg_plugins.gateway.worker_state import Work
    from disagg_plugins.telemetry.records import RequestRecord
    from disagg_plugins.types import RequestProfile, Worker, WorkerLoad

HEDGE = "hedge"
"""The side of a second call for an answer that has not begun."""


class Calls:
    """What one request asks of workers, by side.

    Args:
        gateway: Knows the workers.
        path: Where they are asked.
        shared_headers: Lines for all calls.
        profile: The request.
        record: Is told the load around each call.
        times: The request's moments.

    Attributes:
        open: The calls whose answers are awaited or pass.
        heard: What each has said so far.
        claims: The work that each is counted with.
        surroundings: The load around them.
    """

    __slots__ = (
        "_gateway",
        "_path",
        "_record",
        "_shared",
        "_times",
        "claims",
        "heard",
        "open",
        "surroundings",
    )

    def __init__(
        self,
        gateway: Gateway,
        path: str,
        shared_headers: bytes,
        profile: RequestProfile,
        record: RequestRecord,
        times: Timeline,
    ) -> None:
        self._gateway = gateway
        self._path = path.encode("ascii")
        self._shared = shared_headers
        self._record = record
        self._times = times
        self.open: dict[str, Call] = {}
        self.heard: dict[str, Heard] = {}
        self.claims = Claims(gateway.fleet)
        self.surroundings = Surroundings(gateway.read_tokens, profile.cached_tokens)

    def send(
        self, side: str, worker: Worker, body: bytes, work: Work, listener: CallListener
    ) -> Call:
        """Make a call; ``listener`` hears of it."""
        gateway = self._gateway
        if side == "decode":
            self.claims.leave(EXPECTED)
        if side != HEDGE:
            self._note_load(side, worker, gateway.fleet.load(worker.name))
        self.heard[side] = Heard()
        pool, given = gateway.members.give(worker, work)
        self.claims.note(side, worker.name, given)
        payload = post(self._path, pool.host_header, self._shared, body)
        if isinstance(body, AnnouncedBody):
            call: Call = self._announce(side, worker, body, payload, pool, listener)
        else:
            self.open[side] = call = Call(side, payload, listener)
            pool.submit(call)
        return call

    def _announce(
        self,
        side: str,
        worker: Worker,
        body: AnnouncedBody,
        payload: bytes,
        pool: WorkerPool,
        listener: CallListener,
    ) -> AnnouncedCall:
        connect = functools.partial(self._gateway.members.announcing, worker)
        self.open[side] = call = AnnouncedCall(side, payload, listener, pool, connect)
        call.begin(body)
        return call

    def cancel(self, side: str) -> None:
        """End a call, if there is one; its worker has no more work of this request."""
        call = self.open.pop(side, None)
        if call is not None and not call.ended:
            call.cancel()
        self.claims.leave(side)

    def _note_load(self, side: str, worker: Worker, load: WorkerLoad) -> None:
        self.surroundings.sent(self._record, self._times, side, worker.name, load)

    def adopt(self, hedge: Hedge, listener: CallListener) -> Call:
        """Make the hedge the decode call, heard by ``listener`` from now on."""
        self._note_load("decode", hedge.worker, hedge.load)
        self.cancel("decode")
        self.claims.leave(EXPECTED)
        self.claims.rename(HEDGE, "decode")
        call = self.open["decode"] = self.open.pop(HEDGE)
        self.heard["decode"] = self.heard.pop(HEDGE)
        call.side, call.listener = "decode", listener
        return call

    def end(self) -> None:
        """End whatever is still open."""
        for side in list(self.open):
            self.cancel(side)
        self.claims.leave_all()
        self.heard.clear()
