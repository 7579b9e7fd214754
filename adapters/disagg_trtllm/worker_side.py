"""The worker half of one rank: copies between its KV tensor and the memory that peers share."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from disagg_plugins.engine.block_kv import publish_blocks
from disagg_plugins.errors import DisaggError, LocalProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disagg_plugins.engine.rank import Rank
    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_plugins.handoff.tickets import Ticket
    from disagg_trtllm.plan import LoadStep, Plan, PublishStep, Staged

log = logging.getLogger(__name__)

ELEMENTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Elements are moved by size, never computed with."""

COPY_THREADS = 2


class WorkerSide:
    """Publishes and loads for one rank; close it.

    Args:
        tensor: shape ``(blocks, layers, 2, heads * tokens * dim)``.
        layout: Of this rank.
        whole: Of all heads, as fetched KV lies.
        rank: This rank's part in handoffs.
        verify: Checks a ticket for publishing; raises ``DisaggError``.
        asynchronous: Whether loads are done on threads.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        layout: KVLayout,
        whole: KVLayout,
        rank: Rank,
        *,
        verify: Callable[[str], Ticket],
        asynchronous: bool,
    ) -> None:
        self._layout, self._whole, self._rank, self._verify = layout, whole, rank, verify
        self._asynchronous = asynchronous
        element = ELEMENTS[layout.element_bytes]
        self._flat = tensor.view(element)
        self._blocks = self._flat.view(
            len(tensor),
            layout.num_layers,
            2,
            layout.num_kv_heads_local,
            layout.block_size_tokens,
            layout.head_dim,
        )
        self._memory = _Memory()
        self._threads = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="disagg-copy")
        self._lock = threading.Lock()
        self._copying: dict[int, Future[None]] = {}
        self._asked: set[int] = set()

    # Loads

    def load(self, plan: Plan, stream: Any) -> None:
        """Copy what the plan says; asynchronously where the engine was told so."""
        for step in plan.load:
            if self._asynchronous:
                self._copying[step.request_id] = self._threads.submit(self._copy, step, None)
            else:
                self._copy(step, stream)

    def loaded(self, started: Sequence[int]) -> list[int]:
        """Return those of the requests that began to load whose KV is here now, each once.

        Raises:
            Exception: A copy failed: the engine must not go on, it takes these tokens for read.
        """
        self._asked.update(started)
        over = [i for i, f in self._copying.items() if i in self._asked and f.done()]
        for request_id in over:
            self._asked.discard(request_id)
            self._copying.pop(request_id).result()
        return over

    def _copy(self, step: LoadStep, stream: Any) -> None:
        size = self._layout.block_size_tokens
        first = step.first_token // size
        blocks = step.blocks[first:]
        if min(blocks, default=0) < 0 or len(step.blocks) * size < step.end_token:
            raise LocalProtocolError(
                f"request {step.request_id}: tokens [{step.first_token}, {step.end_token}) were "
                f"promised, and the engine gave the blocks {step.blocks[:8]!r}..."
            )
        source = self._heads(self._memory.of(step.staged, self._whole))
        part = torch.from_numpy(source[first : first + len(blocks)].copy()).to(self._blocks.device)
        if time.monotonic() > step.until_s:
            raise LocalProtocolError(
                f"request {step.request_id}: its KV was copied after its lease, when it may be "
                "another prompt's: raise handoff.lease_s"
            )
        with _on(stream):
            for index, block in enumerate(blocks):
                start = (first + index) * size
                begin = max(0, step.first_token - start)
                end = min(size, step.end_token - start)
                self._blocks[block, ..., begin:end, :] = part[index, ..., begin:end, :]
        if stream is None and self._blocks.device.type == "cuda":
            torch.cuda.synchronize(self._blocks.device)

    def _heads(self, kv: NDArray[np.uint8]) -> NDArray[Any]:
        """Return this rank's heads of fetched KV: ``[blocks, layers, 2, heads, tokens, dim]``."""
        layout, whole = self._layout, self._whole
        shape = (
            len(kv),
            whole.num_layers,
            2,
            whole.num_kv_heads,
            whole.block_size_tokens,
            whole.head_dim,
        )
        element = {1: np.uint8, 2: np.int16, 4: np.int32}[whole.element_bytes]
        heads: NDArray[Any] = kv.reshape(-1).view(element).reshape(shape)
        start = layout.head_start
        return heads[:, :, :, start : start + layout.num_kv_heads_local]

    # Publications

    def publish(self, plan: Plan, stream: Any) -> None:
        """Stage the prompts that this iteration completed, when the stream has computed them."""
        if plan.publish and self._blocks.device.type == "cuda":
            stream.synchronize()
        for step in plan.publish:
            try:
                self._publish(step)
            except DisaggError as exc:
                log.warning("request %d is not published: %s", step.request_id, exc)
            except Exception:
                # one rank alone must not raise: its peers would wait for it
                log.exception("request %d is not published", step.request_id)

    def _publish(self, step: PublishStep) -> None:
        ticket = self._verify(step.ticket)
        publication = self._rank.store.open(ticket, step.num_tokens, prompt=step.prompt)
        try:
            ids = torch.tensor(step.blocks, device=self._flat.device)
            rows = self._flat.index_select(0, ids).cpu()
            kv: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
            kv = kv.reshape(len(step.blocks), self._layout.num_layers, -1)
            publish_blocks(publication, kv, range(len(step.blocks)))
        except BaseException as exc:
            publication.abort(str(exc))
            raise

    def close(self) -> None:
        """Stop serving; bounded by the policy's time-outs."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._rank.close()
        self._memory.close()


def _on(stream: Any) -> Any:
    if stream is None or not isinstance(stream, getattr(torch.cuda, "Stream", ())):
        return nullcontext()
    return torch.cuda.stream(stream)


class _Memory:
    """Maps the scheduler's staging, which may be another process on this machine."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._lock = threading.Lock()

    def of(self, staged: Staged, layout: KVLayout) -> NDArray[np.uint8]:
        """Return fetched KV: uint8, shape ``(num_blocks, layers, row_bytes)``.

        Raises:
            LocalProtocolError: It cannot be mapped: the ranks are on several machines.
        """
        with self._lock:
            mapped = self._maps.get((staged.pid, staged.fd))
            if mapped is None:
                mapped = self._maps[staged.pid, staged.fd] = _mapped(staged)
        num_bytes = staged.num_blocks * layout.num_layers * layout.row_bytes
        if staged.offset + num_bytes > len(mapped):
            raise LocalProtocolError(f"{staged} is outside the scheduler's staging")
        found = np.frombuffer(mapped, np.uint8, num_bytes, staged.offset)
        return found.reshape(staged.num_blocks, layout.num_layers, layout.row_bytes)

    def close(self) -> None:
        """Unmap, unless a view is still held."""
        with self._lock:
            maps, self._maps = self._maps, {}
        for mapped in maps.values():
            try:
                mapped.close()
            except BufferError:
                log.debug("a view of the staging outlives its worker")


def _mapped(staged: Staged) -> mmap.mmap:
    path = f"/proc/{staged.pid}/fd/{staged.fd}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise LocalProtocolError("the scheduler's staging could shrink")
            size = os.fstat(descriptor).st_size
            return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as exc:
        raise LocalProtocolError(
            f"the scheduler's staging cannot be mapped from {path} ({exc}): all ranks of a worker "
            "must run on one machine, as one user"
        ) from exc
