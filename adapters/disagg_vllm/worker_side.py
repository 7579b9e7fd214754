"""The worker half of the connector: publishes layers as they are computed, loads what decode lacks.

Lives in each worker process (one a tensor-parallel rank). Publishing runs inside the forward pass
and only copies; listening, leases and loading run on threads of their own. Imports no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from disagg_plugins.errors import DisaggError, HandoffAborted, LocalProtocolError
from disagg_plugins.handoff.endpoints import from_json
from disagg_plugins.types import HandoffId
from disagg_vllm.caches import expand
from disagg_vllm.steps import LoadResult, LoadStep, PublishStep, ReleaseStep, StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from disagg_plugins.handoff.interfaces import Endpoint, Listener
    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_plugins.handoff.publications import Publication, PublicationStore
    from disagg_plugins.handoff.reader import HandoffReader
    from disagg_plugins.handoff.tickets import Ticket

logger = logging.getLogger(__name__)

LOADER_THREADS = 16
"""Loads that one rank runs at once; most of them wait for a peer."""

LOADS_PER_PEER = 4
"""Loads from one peer at once, so that a peer that hangs leaves threads for the others."""

RELEASE_THREADS = 1

EMPTY_STEP_WAIT_S = 0.005
"""How long a step without a forward pass waits for a load to end. The engine runs such steps as
fast as it can while requests wait for KV; without the wait they take the CPU from the loads."""


class CachePort(Protocol):
    """Moves block rows between the engine's caches and byte buffers."""

    def publish(
        self,
        layer: int,
        block_ids: Sequence[int],
        out: NDArray[np.uint8],
        done: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """Copy blocks into ``out``; must not block.

        Calls ``done`` when the rows are there, or ``failed`` with the reason when they never will
        be; what it raises itself is the caller's to handle.
        """
        ...

    def before_loads(self) -> None:
        """Mark what the engine has queued so far: loads that start now come after it."""
        ...

    def after_publishes(self, action: Callable[[], None]) -> None:
        """Call ``action`` once every publish so far is done."""
        ...

    def write_rows(self, layer: int, block_ids: Sequence[int], rows: memoryview) -> None:
        """Copy whole rows of this rank's layout into blocks."""
        ...

    def row_targets(self, layer: int, block_ids: Sequence[int]) -> list[memoryview] | None:
        """Return writable bytes of whole rows of these blocks, or None where there are none."""
        ...

    def write_canonical(
        self, layer: int, block_ids: Sequence[int], first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Copy canonical KV that starts at the first token of ``block_ids[0]``."""
        ...

    def finish_load(self) -> None:
        """Return once everything this thread wrote is visible to the engine."""
        ...

    def unpack(self, rows: memoryview) -> memoryview:
        """Return plain rows for rows as staged."""
        ...

    def close(self) -> None:
        """Give back what the port holds."""
        ...


class BlockSink:
    """Writes one request's KV into the engine's blocks; see ``handoff.interfaces.DirectSink``.

    Args:
        port: The caches.
        layout: This rank's layout.
        block_ids: Kernel block ids of the request from its block 0 on.
    """

    def __init__(self, port: CachePort, layout: KVLayout, block_ids: Sequence[int]) -> None:
        self._port = port
        self._layout = layout
        self._block_ids = block_ids

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Take whole block rows of one layer."""
        count = rows.nbytes // self._layout.row_bytes
        self._port.write_rows(layer, self._blocks(first_block, count), rows)

    def native_targets(
        self, layer: int, first_block: int, num_blocks: int
    ) -> Sequence[memoryview] | None:
        """Return where rows of the request belong, so that they are received in place."""
        return self._port.row_targets(layer, self._blocks(first_block, num_blocks))

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Take canonical KV of one layer; ``first_token`` lies on a block boundary."""
        layout = self._layout
        num_tokens = kv.nbytes // layout.canonical_bytes(1, end_head - first_head)
        first_block, rest = divmod(first_token, layout.block_size_tokens)
        if rest:
            raise HandoffAborted("-", f"token {first_token} is inside a block; nothing was written")
        blocks = self._blocks(first_block, layout.num_blocks(num_tokens))
        start = layout.head_start
        self._port.write_canonical(layer, blocks, first_head - start, end_head - start, kv)

    def _blocks(self, first_block: int, count: int) -> Sequence[int]:
        blocks = self._block_ids[first_block : first_block + count]
        if len(blocks) != count:
            raise HandoffAborted(
                "-",
                f"the peer sent blocks [{first_block}, {first_block + count}) of a request that "
                f"has {len(self._block_ids)}",
            )
        return blocks


class WorkerSide:
    """Publishes and loads for one rank.

    Args:
        layer_names: The model's layers in order.
        port: The rank's caches.
        layout: The rank's layout.
        block_ratio: Kernel blocks in one scheduler block.
        store: Publications of this rank.
        listeners: What serves the store.
        endpoint: Where peers find the listeners.
        reader: Loads from peers.
        verify: Checks a ticket; raises ``DisaggError``.
        count: Told of each end for the engine's metrics: ``(name, amount)``.
    """

    def __init__(
        self,
        *,
        layer_names: Sequence[str],
        port: CachePort,
        layout: KVLayout,
        block_ratio: int,
        store: PublicationStore,
        listeners: Sequence[Listener],
        endpoint: Endpoint,
        reader: HandoffReader,
        verify: Callable[[str], Ticket],
        count: Callable[[str, float], None],
    ) -> None:
        self._layer_index = {name: i for i, name in enumerate(layer_names)}
        self._port = port
        self._layout = layout
        self._block_ratio = block_ratio
        self._store = store
        self._listeners = listeners
        self.endpoint = endpoint
        self._reader = reader
        self._verify = verify
        self._count = count
        self._publications: dict[str, Publication] = {}
        self._step: list[tuple[PublishStep, Publication, list[int]]] = []
        self._pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="disagg-load")
        self._releaser = ThreadPoolExecutor(RELEASE_THREADS, thread_name_prefix="disagg-release")
        self._peers: Counter[str] = Counter()
        self._queued: list[tuple[str, LoadStep, float]] = []
        self._lock = threading.Lock()
        self._load_ended = threading.Condition(self._lock)
        self._loading = 0
        self._forward = False
        self._ended: Counter[str] = Counter()
        self._loads: list[LoadResult] = []
        self._received: set[str] = set()
        self._failed: dict[str, tuple[int, ...]] = {}

    # Publishing ----------------------------------------------------------------------------

    def start_step(self, plan: StepPlan) -> None:
        """Open what this step publishes, before its forward pass."""
        self._step = []
        self._forward = False
        for handoff_id, reason in plan.abort:
            if (publication := self._publications.pop(handoff_id, None)) is not None:
                self._port.after_publishes(lambda p=publication, r=reason: p.abort(r))  # type: ignore[misc]
        for item in plan.publish:
            publication = self._publications.get(item.handoff_id) or self._open(item)
            if publication is not None:
                blocks = expand(item.block_ids, self._block_ratio)
                self._step.append((item, publication, blocks))

    def _open(self, item: PublishStep) -> Publication | None:
        if item.first_block > 0:
            return None
        try:
            publication = self._store.open(
                self._verify(item.ticket), item.num_tokens, prompt=item.prompt
            )
        except DisaggError as error:
            logger.warning("handoff %s is not published: %s", item.handoff_id, error)
            self._count("publish_failed", 1)
            self.publication_ended(item.handoff_id)
            return None
        self._publications[item.handoff_id] = publication
        return publication

    def publish_layer(self, layer_name: str) -> None:
        """Copy what this step computed of one layer; called inside the forward pass."""
        self._forward = True
        if not self._step:
            return
        layer = self._layer_index[layer_name]
        for item, publication, blocks in self._step:
            first = item.first_block * self._block_ratio
            end = publication.num_blocks if item.last else first + len(blocks)
            blocks = blocks[: end - first]

            def failed(
                reason: str, publication: Publication = publication, id_: str = item.handoff_id
            ) -> None:
                logger.warning("handoff %s: layer %d: %s", id_, layer, reason)
                publication.abort(reason)

            def done(publication: Publication = publication, end: int = end) -> None:
                publication.publish(layer, end)

            try:
                if len(blocks) != end - first:
                    raise LocalProtocolError(
                        f"{len(blocks)} blocks were computed, {end - first} belong to the handoff"
                    )
                out = publication.rows(layer)[first:end]
                self._port.publish(layer, blocks, out, done, failed)
            except DisaggError as error:
                logger.warning("handoff %s: layer %d: %s", item.handoff_id, layer, error)
                self._drop(item.handoff_id, str(error))
            except Exception as error:
                # Inside the engine's forward pass: one handoff may fail, the engine may not.
                logger.exception("handoff %s: layer %d", item.handoff_id, layer)
                self._drop(item.handoff_id, f"{type(error).__name__}: {error}")

    def _drop(self, handoff_id: str, reason: str) -> None:
        publication = self._publications.pop(handoff_id, None)
        self._step = [entry for entry in self._step if entry[0].handoff_id != handoff_id]
        if publication is not None:
            self._port.after_publishes(lambda: publication.abort(reason))

    def end_step(self) -> None:
        """Forget publications that this step completed, after its forward pass."""
        for item, publication, _ in self._step:
            if item.last:
                self._publications.pop(item.handoff_id, None)
                payload_bytes = (
                    self._layout.num_layers * publication.num_blocks * self._layout.row_bytes
                )
                self._count("published", 1)
                self._count("published_bytes", payload_bytes)
        self._step = []

    def publication_ended(self, handoff_id: str) -> None:
        """Note the end of a publication; called from the store's threads."""
        with self._lock:
            self._ended[handoff_id] += 1

    # Loading -------------------------------------------------------------------------------

    def start_loads(self, plan: StepPlan) -> None:
        """Hand this step's loads and releases to threads; ``handoff.load_s`` runs from here."""
        now_s = time.monotonic()
        if plan.load:
            self._port.before_loads()
        with self._lock:
            self._queued += [(_peer_of(load), load, now_s) for load in plan.load]
            self._loading += len(plan.load)
        self._start_queued()
        for release in plan.release:
            self._releaser.submit(self._release, release)

    def _start_queued(self) -> None:
        """Start queued loads, oldest first, of peers that have less than their share running."""
        with self._lock:
            waiting, self._queued = self._queued, []
            for peer, step, started_s in waiting:
                if self._peers[peer] < LOADS_PER_PEER:
                    self._peers[peer] += 1
                    self._pool.submit(self._load_from, peer, step, started_s)
                else:
                    self._queued.append((peer, step, started_s))

    def _load_from(self, peer: str, step: LoadStep, started_s: float) -> None:
        try:
            self._load(step, started_s)
        finally:
            with self._lock:
                self._peers[peer] -= 1
                if not self._peers[peer]:
                    del self._peers[peer]
            self._start_queued()

    def _load(self, step: LoadStep, started_s: float) -> None:
        result = LoadResult(step.request_id, step.handoff_id, problem="the loader thread failed")
        try:
            sink = BlockSink(self._port, self._layout, expand(step.block_ids, self._block_ratio))
            report = self._reader.load(
                HandoffId(step.handoff_id),
                step.ticket,
                from_json(list(step.endpoints)),
                first_token=step.first_token,
                end_token=step.end_token,
                sink=sink,
                prompt=step.prompt,
                started_s=started_s,
            )
            self._port.finish_load()
            result = LoadResult(
                step.request_id,
                step.handoff_id,
                "",
                report.transport,
                report.form,
                report.num_tokens,
                report.payload_bytes,
                report.seconds,
            )
        except DisaggError as error:
            logger.warning("request %s computes its prompt itself: %s", step.request_id, error)
            result = LoadResult(
                step.request_id, step.handoff_id, f"{type(error).__name__}: {error}"[:500]
            )
        except Exception as error:
            logger.exception("request %s computes its prompt itself", step.request_id)
            result = LoadResult(
                step.request_id, step.handoff_id, f"{type(error).__name__}: {error}"[:500]
            )
        finally:
            self._loaded(result, step.block_ids)

    def _loaded(self, result: LoadResult, block_ids: tuple[int, ...]) -> None:
        if result.problem:
            self._count("load_failed", 1)
        else:
            self._count("loaded", 1)
            self._count("loaded_bytes", result.payload_bytes)
            self._count("loaded_tokens", result.num_tokens)
            self._count("load_seconds", result.seconds)
        with self._lock:
            self._loading -= 1
            self._load_ended.notify_all()
            self._loads.append(result)
            self._received.add(result.request_id)
            if result.problem:
                self._failed[result.request_id] = block_ids

    def _release(self, step: ReleaseStep) -> None:
        try:
            self._reader.release(
                HandoffId(step.handoff_id),
                step.ticket,
                from_json(list(step.endpoints)),
                failed=step.failed,
            )
        except DisaggError as error:
            # The lease frees it; a release only makes that sooner.
            logger.info("handoff %s was not released early: %s", step.handoff_id, error)
        except Exception:
            logger.exception("handoff %s was not released early", step.handoff_id)

    def take_received(self) -> tuple[set[str], dict[str, tuple[int, ...]]]:
        """Return requests whose load ended since the last call; failed ones with their blocks.

        In a step without a forward pass this waits a moment while loads are under way.
        """
        with self._lock:
            if self._loading and not self._received and not self._forward:
                self._load_ended.wait(EMPTY_STEP_WAIT_S)
            received, self._received = self._received, set()
            failed, self._failed = self._failed, {}
        return received, failed

    def take_result(self) -> StepResult | None:
        """Return what the scheduler half must know, or None."""
        with self._lock:
            result = StepResult(self._ended, self._loads)
            self._ended, self._loads = Counter(), []
        return result or None

    def close(self) -> None:
        """Stop serving and loading; bounded by the policy's time-outs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._releaser.shutdown(wait=False, cancel_futures=True)
        for listener in self._listeners:
            listener.close()
        self._reader.close()
        self._port.close()
        self._store.close()


def _peer_of(step: LoadStep) -> str:
    """Return what tells one prefill worker from another, of any shape it was sent in."""
    return repr(step.endpoints[:1])[:512]
