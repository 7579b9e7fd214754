"""The engine's own part in handoffs: publishes the prompts it reads, loads those it is handed.

A prefill request's KV is staged when its last chunk is computed, before its answer is told. A
decode request is parked while threads load what the engine's own cache lacks; where that fails it
computes its prompt itself.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from disagg_plugins.engine.block_kv import BlockSink, publish_blocks
from disagg_plugins.engine.params import HandoffParams, answer_params, read_params
from disagg_plugins.engine.rank import Rank, TextIdentity
from disagg_plugins.errors import DisaggError, UnsupportedEngineError
from disagg_plugins.handoff.cancellation import Cancellation
from disagg_plugins.handoff.endpoints import from_json, to_json
from disagg_plugins.handoff.fingerprint import rope_settings, weights_identity
from disagg_plugins.handoff.interfaces import Identity, LoadReport
from disagg_plugins.handoff.layouts import ModelFingerprint
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_reference.config import raw_config
from disagg_reference.hosting import Batch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from disagg_plugins.engine.settings import WorkerSettings
    from disagg_plugins.handoff.tickets import Ticket
    from disagg_reference.pool import KVPool
    from disagg_reference.request import Request

log = logging.getLogger(__name__)

ENGINE = "reference"
LOADER_THREADS = 8
"""Loads at once; each waits for a peer most of the time."""

MAX_PROBLEM_CHARS = 500


@dataclass(slots=True)
class _Load:
    """One request's load, over all ranks."""

    request: Request
    ticket: Ticket
    params: HandoffParams
    cancellations: list[Cancellation] = field(default_factory=list)
    futures: list[Future[LoadReport]] = field(default_factory=list)


class NativeHost:
    """See the module, and ``hosting.ConnectorHost``.

    Args:
        pools: KV of each rank, in host memory.
        model: The model's folder.
        settings: What the engine was told.

    Raises:
        UnsupportedEngineError: The pools are not in host memory.
        ConfigError: No transport of the policy is installed.
    """

    def __init__(self, pools: Sequence[KVPool], model: Path, settings: WorkerSettings) -> None:
        self._settings = settings
        self._kv = [block_bytes(pool) for pool in pools]
        self._layouts = [pool.shape.layout for pool in pools]
        self.ranks: list[Rank] = []
        try:
            for pool in pools:
                self.ranks.append(make_rank(ENGINE, pool, model, settings))
        except BaseException:
            self._close_ranks()
            raise
        self._report = self.ranks[0].reporter.send
        self._threads = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="disagg-load")
        self._lock = threading.Lock()
        self._loads: dict[int, _Load] = {}
        self._loaded: deque[int] = deque()
        self._batch: Batch = Batch(())

    # Decode

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """See ``ConnectorHost``: what the ticket promises is loaded asynchronously."""
        try:
            params = read_params(request.params)
            if params is None or params.step != "decode":
                return 0, False
            ticket = self._settings.verify(params.ticket, "decode")
        except DisaggError as exc:
            log.warning("request %d computes its prompt itself: %s", request.request_id, exc)
            return 0, False
        wanted = len(request.prompt) - 1 - computed_tokens
        problem = self._problem(request, params)
        if problem or wanted <= 0:
            self._threads.submit(self._release, ticket, params, problem)
            if problem:
                self._failed(ticket.handoff_id, problem, len(request.prompt) - computed_tokens)
            else:
                self._told_loaded(ticket.handoff_id, request, [])
            return 0, False
        self._loads[request.request_id] = _Load(request, ticket, params)
        return wanted, True

    def _problem(self, request: Request, params: HandoffParams) -> str:
        if params.num_tokens != len(request.prompt):
            return (
                f"the handoff has {params.num_tokens} tokens, the prompt {len(request.prompt)}: "
                "compare the tokenizers of both workers"
            )
        if params.prompt and params.prompt != prompt_digest(request.prompt):
            return "the handoff is of another prompt of the same length"
        return ""

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """See ``ConnectorHost``: begins the load."""
        load = self._loads.get(request.request_id)
        if load is None:
            return
        load.cancellations = [Cancellation() for _ in self.ranks]
        for rank, cancellation in enumerate(load.cancellations):
            load.futures.append(self._threads.submit(self._load, load, rank, cancellation))
        for future in load.futures:
            future.add_done_callback(partial(self._one_loaded, load))

    def _load(self, load: _Load, rank: int, cancellation: Cancellation) -> LoadReport:
        request = load.request
        return self.ranks[rank].reader.load(
            load.ticket.handoff_id,
            load.params.ticket,
            from_json(list(load.params.endpoints)),
            first_token=request.local_tokens,
            end_token=len(request.prompt),
            sink=BlockSink(self._kv[rank], self._layouts[rank], request.blocks),
            prompt=prompt_digest(request.prompt),
            cancellation=cancellation,
        )

    def _one_loaded(self, load: _Load, _future: Future[LoadReport]) -> None:
        with self._lock:
            if not all(future.done() for future in load.futures):
                return
            if self._loads.pop(load.request.request_id, None) is None:
                return  # another rank's thread was first
        request, handoff_id = load.request, load.ticket.handoff_id
        problems = [exc for future in load.futures if (exc := _problem_of(future)) is not None]
        if problems:
            log.warning(
                "request %d computes its prompt itself: %s", request.request_id, problems[0]
            )
            request.matched_tokens = 0
            left = len(request.prompt) - request.local_tokens
            self._failed(handoff_id, f"{type(problems[0]).__name__}: {problems[0]}", left)
        else:
            self._told_loaded(handoff_id, request, [f.result() for f in load.futures])
        with self._lock:
            self._loaded.append(request.request_id)

    def _release(self, ticket: Ticket, params: HandoffParams, problem: str) -> None:
        for rank in self.ranks:
            try:
                endpoints = from_json(list(params.endpoints))
                rank.reader.release(ticket.handoff_id, params.ticket, endpoints, failed=problem)
            except DisaggError as exc:
                # the lease frees it; a release only makes that sooner
                log.info("handoff %s was not released early: %s", ticket.handoff_id, exc)

    # Prefill

    def begin(self, batch: Batch) -> None:
        """See ``ConnectorHost``."""
        self._batch = batch

    def before_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""

    def after_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""

    def end(self) -> None:
        """See ``ConnectorHost``: publishes what this iteration completed."""
        for each in self._batch.scheduled:
            if each.completes_prompt and each.request.params:
                self._publish(each.request)

    def _publish(self, request: Request) -> None:
        handoff_id = ""
        try:
            params = read_params(request.params)
            if params is None or params.step != "prefill":
                return
            ticket = self._settings.verify(params.ticket, "prefill")
            handoff_id = ticket.handoff_id
            digest = prompt_digest(request.prompt)
            opened = []
            try:
                for rank in self.ranks:
                    opened.append(rank.store.open(ticket, len(request.prompt), prompt=digest))
                for publication, kv in zip(opened, self._kv, strict=True):
                    publish_blocks(publication, kv, request.blocks)
            except BaseException as exc:
                for publication in opened:
                    publication.abort(str(exc))
                raise
        except DisaggError as exc:
            log.warning("request %d is not published: %s", request.request_id, exc)
            if handoff_id:
                self._failed(handoff_id, f"{type(exc).__name__}: {exc}", None)
            return
        request.told = answer_params(
            num_tokens=len(request.prompt),
            prompt=digest,
            endpoints=to_json([rank.endpoint for rank in self.ranks]),
        )

    def cancel(self, request: Request) -> None:
        """See ``ConnectorHost``: nobody waits for the load any more."""
        with self._lock:
            load = self._loads.get(request.request_id)
        for cancellation in load.cancellations if load is not None else ():
            cancellation.cancel("its client went")

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """See ``ConnectorHost``: what was published has been copied."""
        return False

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        """See ``ConnectorHost``."""
        with self._lock:
            loaded, self._loaded = list(self._loaded), deque()
        return (), loaded

    def close(self) -> None:
        """Stop serving and loading; bounded by the policy's time-outs."""
        with self._lock:
            loads = list(self._loads.values())
        for load in loads:
            for cancellation in load.cancellations:
                cancellation.cancel("the engine ends")
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._close_ranks()

    def _close_ranks(self) -> None:
        for rank in self.ranks:
            rank.close()

    # Reports

    def _told_loaded(
        self, handoff_id: str, request: Request, reports: Sequence[LoadReport]
    ) -> None:
        loaded = request.matched_tokens if reports else 0
        self._report(
            {
                "kind": "loaded",
                "handoff_id": handoff_id,
                "num_tokens": loaded,
                "tokens_local": request.local_tokens,
                "tokens_recomputed": len(request.prompt) - request.local_tokens - loaded,
                "bytes": sum(report.payload_bytes for report in reports),
                "transport": reports[0].transport if reports else "none",
                "form": reports[0].form if reports else "none",
                "seconds": max((report.seconds for report in reports), default=0.0),
            }
        )

    def _failed(self, handoff_id: str, problem: str, recomputed: int | None) -> None:
        record: dict[str, object] = {
            "kind": "failed",
            "handoff_id": handoff_id,
            "problem": problem[:MAX_PROBLEM_CHARS],
        }
        if recomputed is not None:
            record["tokens_recomputed"] = recomputed
        self._report(record)


def _problem_of(future: Future[LoadReport]) -> BaseException | None:
    if future.cancelled():
        return DisaggError("the engine ends")
    return future.exception()


def block_bytes(pool: KVPool) -> NDArray[np.uint8]:
    """Return a pool's memory as uint8, shape ``(num_blocks, num_layers, row_bytes)``; no copy.

    Raises:
        UnsupportedEngineError: It is not in host memory.
    """
    if pool.tensor.device.type != "cpu":
        raise UnsupportedEngineError(
            f"the reference engine hands over KV from host memory only, not {pool.tensor.device}"
        )
    found: NDArray[np.uint8] = pool.tensor.view(torch.uint8).numpy()
    return found.reshape(*found.shape[:2], -1)


def make_rank(engine: str, pool: KVPool, model: Path, settings: WorkerSettings) -> Rank:
    """Return one rank's part in handoffs, which introduces the worker to the gateway.

    Raises:
        ConfigError: No transport of the policy is installed.
    """
    shape, layout = pool.shape, pool.shape.layout
    identity = Identity(
        name=f"{engine} {settings.worker} rank {shape.tp_rank}/{shape.tp_size}",
        fingerprint=ModelFingerprint(
            model=weights_identity(str(model)),
            dtype=layout.dtype,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            rope=rope_settings(raw_config(model)),
        ),
        layout=layout,
        tp_rank=shape.tp_rank,
        tp_size=shape.tp_size,
    )
    return Rank(
        engine,
        identity,
        TextIdentity.of(str(model), None, None),
        settings,
        kv_tokens=shape.num_blocks * shape.block_size_tokens,
    )
