"""Listening to what the engines say of their own prefix caches.

Engines publish which blocks they store and remove (vLLM and SGLang: ``--kv-events-config``). What
is missed could be a removal, so a gap in the sequence, a lost connection or a restart clears all
that is known of that worker: nothing stale is ever believed, and knowledge grows again from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.kv_event_messages import read_message
from disagg_plugins.scheduling.kv_blocks import PART_BLOCKS, BlockTree, cost, parts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.scheduling.prefix_hashes import PrefixHasher
    from disagg_plugins.scheduling.prefix_index import PrefixIndex

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 20
"""A batch tells of one step of an engine: 16,384 new tokens of 5 bytes and their blocks are some
0.2 MiB. ZeroMQ drops a peer that sends more. Reading this much takes up to 50 ms at once; what it
says is followed in parts, between which requests have their turn."""

MAX_QUEUED = 1024
"""Messages held by ZeroMQ for each worker: minutes of steps. Beyond it they are lost: a gap."""

MAX_BLOCKS = 1 << 17
"""Of one worker: two million tokens in blocks of 16."""

MAX_BLOCKS_OF_ALL = 1 << 19
"""About 300 MiB."""

HEARTBEAT_MS = 5_000
SILENT_MS = 15_000
"""A peer that does not answer heartbeats that long is gone: its host may have vanished."""

RECONNECT_MS = 200
MAX_RECONNECT_MS = 5_000
MAX_SOCKETS = 32_768
"""Of one gateway: each worker takes three (the subscription, and both ends of what tells of its
connection), and a closed one counts until ZeroMQ's own thread has ended it."""

AGAIN_S = 5.0
"""After a failure of the listener itself."""


@dataclass(slots=True)
class Listening:
    """What is heard of one worker.

    Attributes:
        tree: Its blocks.
        state: ``waiting`` for a connection, ``listening``, or ``cleared`` until the next batch.
        clears: How often all knowledge was dropped.
        problem: Why, the last time.
        batches: Heard so far.
        next: The sequence number expected, or None.
    """

    tree: BlockTree
    state: str = "waiting"
    clears: int = 0
    problem: str = ""
    batches: int = 0
    next: int | None = None
    _told: bool = False

    def hear(self, frames: Sequence[bytes]) -> None:
        """Follow one message at once; see ``follow``."""
        for _ in self.follow(frames):
            pass

    def follow(self, frames: Sequence[bytes]) -> Iterator[None]:
        """Follow one message, in steps of some 10 ms; one that cannot be followed clears all.

        Yields before each step.
        """
        yield
        try:
            number, events = read_message(frames)
        except RemoteProtocolError as exc:
            self.clear(str(exc))
            return
        if self.next is not None and number != self.next:
            what = "the engine started anew" if number < self.next else "batches were lost"
            self.clear(f"{what}: batch {number} came where {self.next} was next")
        self.next = number + 1
        self.batches += 1
        try:
            done = 0
            for part in (part for event in events for part in parts(event)):
                done += cost(part)
                if done > PART_BLOCKS:
                    yield
                    done = cost(part)
                self.tree.on(part)
        except ValueError as exc:
            self.clear(str(exc))
            return
        self.state = "listening"

    def clear(self, problem: str) -> None:
        """Forget what the worker holds; ``problem`` says why."""
        self.next = None
        self.clears += 1
        self.problem = problem
        self.state = "cleared"
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        name = self.tree.worker
        log.log(level, "what worker %s caches is not known any more: %s", name, problem)
        self.tree.clear()

    def lost(self) -> None:
        """The connection is gone: what the engine does meanwhile is not heard."""
        if self.next is not None or len(self.tree):
            self.clear("the connection was lost")
        self.state = "waiting"

    def as_dict(self) -> dict[str, object]:
        """Return what the status tells."""
        return {
            "state": self.state,
            "blocks": len(self.tree),
            "full": self.tree.full,
            "batches": self.batches,
            "clears": self.clears,
            "problem": self.problem,
        }


class KvEvents:
    """Listens to every worker whose policy says where it publishes.

    Args:
        endpoints: ``tcp://host:port`` by the worker's name.
        index: Where what is held is noted.
        hasher: The one that hashes prompts.
    """

    def __init__(
        self, endpoints: Mapping[str, str], index: PrefixIndex, hasher: PrefixHasher
    ) -> None:
        self._index = index
        self._hasher = hasher
        self._endpoints = dict(endpoints)
        bound = self._bound(len(endpoints))
        self.workers = {
            name: Listening(BlockTree(name, index, hasher, bound)) for name in endpoints
        }
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._context: zmq.asyncio.Context | None = None

    def _bound(self, workers: int) -> int:
        """Return how many blocks one of so many may have."""
        return min(MAX_BLOCKS, MAX_BLOCKS_OF_ALL // max(1, workers))

    def join(self, name: str, endpoint: str) -> None:
        """Listen to a worker that joined; one that is listened to already stays as it is."""
        if name in self.workers:
            return
        bound = self._bound(len(self.workers) + 1)
        tree = BlockTree(name, self._index, self._hasher, bound)
        self.workers[name] = Listening(tree)
        self._endpoints[name] = endpoint
        self._begin(name)

    def leave(self, name: str) -> None:
        """Listen no more to a worker that leaves, and forget what it holds."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
        heard = self.workers.pop(name, None)
        if heard is not None:
            del self._endpoints[name]
            heard.next = None  # nothing is left to lose when the task ends
            heard.tree.clear()

    def knows(self, worker: str) -> bool:
        """Return whether what this worker holds is heard from itself now."""
        heard = self.workers.get(worker)
        return heard is not None and heard.state == "listening"

    def block_tokens(self, worker: str) -> int:
        """Return the block size of an engine that is listened to; 1 of others."""
        heard = self.workers.get(worker)
        return 1 if heard is None else heard.tree.block_tokens

    def told(self, worker: str) -> dict[str, object] | None:
        """Return what the status tells of a worker; None where it is not listened to."""
        heard = self.workers.get(worker)
        return None if heard is None else heard.as_dict()

    async def run(self) -> None:
        """Listen to all workers, and to those that join, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for name in self._endpoints:
                    self._begin(name)
                await asyncio.get_running_loop().create_future()
        finally:
            self._group = None
            if self._context is not None:
                self._context.destroy(linger=0)

    def _begin(self, name: str) -> None:
        if self._group is None:
            return
        if self._context is None:
            self._context = zmq.asyncio.Context()
            # before the first socket; ZeroMQ's own bound of 1,023 is that of 341 workers
            self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            self._context.setsockopt(zmq.IPV6, 1)
        work = self._listen(self._context, self._endpoints[name], self.workers[name])
        self._tasks[name] = self._group.create_task(work)

    async def _listen(self, context: zmq.asyncio.Context, endpoint: str, heard: Listening) -> None:
        while True:
            try:
                await self._follow(context, endpoint, heard)
            except (zmq.ZMQError, OSError) as exc:
                heard.clear(f"listening at {endpoint} failed: {exc}")
            except Exception as exc:  # whatever one worker sends, the others are listened to
                log.exception("listening at %s failed", endpoint)
                heard.clear(f"listening at {endpoint} failed: {type(exc).__name__}")
            await asyncio.sleep(AGAIN_S)

    async def _follow(self, context: zmq.asyncio.Context, endpoint: str, heard: Listening) -> None:
        socket = context.socket(zmq.SUB)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, MAX_QUEUED),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, SILENT_MS),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS),
        ):
            socket.setsockopt(option, value)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            socket.subscribe(b"")
            socket.connect(endpoint)
            poller = zmq.asyncio.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
            while True:
                ready = dict(await poller.poll())
                if monitor in ready:
                    parse_monitor_message(await monitor.recv_multipart())
                    # what was sent before the end is dropped with what came after it
                    await _discard(socket)
                    heard.lost()
                elif socket in ready:
                    for _ in heard.follow(await socket.recv_multipart()):
                        await asyncio.sleep(0)  # a flood must not keep the loop from its requests
        finally:
            socket.disable_monitor()
            socket.close(linger=0)
            heard.lost()


async def _discard(socket: zmq.asyncio.Socket) -> None:
    """Drop what has been received so far, at most as much as can have been queued."""
    for _ in range(MAX_QUEUED):
        if not await socket.poll(0):
            return
        await socket.recv_multipart()
