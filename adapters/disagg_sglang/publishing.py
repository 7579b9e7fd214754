"""Publishes one request's pages, chunk by chunk, while its prefill goes on.

Everything but the copying happens in SGLang's scheduler thread; copies run in a thread of the
manager's, in order, so that they overlap the next chunk. Imports no engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from disagg_plugins.errors import DisaggError, LocalProtocolError, StagingFull
from disagg_plugins.handoff.interfaces import Outcome
from disagg_plugins.handoff.prompts import prompt_digest

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import numpy as np
    from numpy.typing import NDArray

    from disagg_plugins.handoff.publications import Publication, PublicationStore
    from disagg_plugins.handoff.tickets import Ticket

logger = logging.getLogger(__name__)

SendState = Literal["waiting", "open", "copying", "done", "failed"]
"""waiting: for staging; open: chunks may come; copying: all have come; done: all are staged."""

RENEW_EVERY_S = 1.0
"""How often a request that waits for its prefill keeps its lease alive."""


class Gather(Protocol):
    """The pages that are read."""

    def gather(self, layer: int, page_ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Copy pages into ``out`` (uint8, ``(pages, row_bytes)``)."""
        ...


class Written(Protocol):
    """A point of the engine's work on a device: ``torch.cuda.Event`` is one."""

    def synchronize(self) -> None:
        """Return when the device has come to it."""
        ...


class PagePublisher:
    """One request's publication.

    Args:
        ticket: Verified for this worker.
        token_ids: The prompt.
        store: Publications of this rank.
        pool: The pages.
        copier: Runs copies one after another.
        staging_wait_s: How long to wait for staging before the request fails.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ticket: Ticket,
        token_ids: Sequence[int],
        *,
        store: PublicationStore,
        pool: Gather,
        copier: Executor,
        staging_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: SendState = "waiting"
        self.reason = ""
        self.payload_bytes = 0
        self.seconds: float | None = None
        self._ticket = ticket
        self._num_tokens = len(token_ids)
        self._prompt = prompt_digest(token_ids)
        self._store = store
        self._pool = pool
        self._copier = copier
        self._clock = clock
        self._give_up_s = clock() + staging_wait_s
        self._renewed_s = clock()
        self._publication: Publication | None = None
        self._sent = 0
        self._first_sent_s = 0.0
        # Held while rows are made readable: pages may be another request's once ``abort`` has
        # returned, so nothing copied after that may ever be published.
        self._lock = threading.Lock()

    @property
    def num_pages(self) -> int:
        """Pages that hold the prompt."""
        return self._store.identity.layout.num_blocks(self._num_tokens)

    @property
    def failed(self) -> bool:
        """Whether the request was given up."""
        return self.state == "failed"

    def poll(self) -> SendState:
        """Return the state, having taken staging or renewed the lease where that is due."""
        if self.state == "waiting":
            self._open()
        publication = self._publication
        if publication is not None and self.state in ("open", "copying"):
            # Consumed early: the only reader takes the same heads from another rank.
            early = publication.outcome not in (None, Outcome.CONSUMED)
            if early and not publication.complete:
                self.abort(f"the handoff ended early: {publication.state.detail}")
            elif self._clock() - self._renewed_s >= RENEW_EVERY_S:
                self._renewed_s = self._clock()
                self._store.renew(publication)
        return self.state

    def _open(self) -> None:
        try:
            self._publication = self._store.open(
                self._ticket, self._num_tokens, prompt=self._prompt
            )
            self.state = "open"
        except StagingFull as error:
            if self._clock() >= self._give_up_s:
                self._fail(str(error))
        except DisaggError as error:
            self._fail(str(error))

    def send(
        self, page_ids: NDArray[np.int64], result: bytes = b"", *, written: Written | None = None
    ) -> None:
        """Publish the next pages of the request.

        Args:
            page_ids: Pages of the pool, int64; copied from after this returns.
            result: What prefill leaves beside the KV; given with the last pages.
            written: When the pages hold their KV, if the device still writes them.

        Raises:
            LocalProtocolError: More pages than the prompt has, or the last ones without a result.
        """
        publication = self._publication
        if publication is None or self.state != "open":
            return  # aborted: SGLang sends on until it has noticed
        first, end = self._sent, self._sent + len(page_ids)
        if end > self.num_pages:
            raise LocalProtocolError(
                f"handoff {publication.handoff_id}: pages [{first}, {end}) of a prompt of "
                f"{self.num_pages} pages were sent"
            )
        self._first_sent_s = self._first_sent_s or self._clock()
        self._sent = end
        if end == self.num_pages:
            if not result:
                raise LocalProtocolError(
                    f"handoff {publication.handoff_id}: the last pages came without a result"
                )
            publication.result = result
            self.state = "copying"
        self._copier.submit(self._copy, publication, page_ids, first, end, written)

    def _copy(
        self,
        publication: Publication,
        page_ids: NDArray[np.int64],
        first: int,
        end: int,
        written: Written | None,
    ) -> None:
        """Copy pages and make them readable; runs in the copier's thread."""
        try:
            if written is not None:
                written.synchronize()
            for layer in range(self._store.identity.layout.num_layers):
                if self.failed:
                    return
                out = publication.rows(layer)[first:end]
                self._pool.gather(layer, page_ids, out)
                with self._lock:
                    if self.failed:
                        return
                    publication.publish(layer, end)
                self.payload_bytes += out.nbytes
            if end == publication.num_blocks:
                self.seconds = self._clock() - self._first_sent_s
                with self._lock:
                    if self.state == "copying":
                        self.state = "done"
        except Exception as error:
            # In a thread whose end nobody awaits: the request fails, and is told why.
            logger.exception("handoff %s: copying KV failed", publication.handoff_id)
            self.abort(f"copying KV failed: {type(error).__name__}: {error}")

    def abort(self, reason: str) -> None:
        """Give the request up, for the readers too; idempotent, nothing after ``done``."""
        with self._lock:
            if self.state in ("done", "failed"):
                return
            self.state, self.reason = "failed", reason
        publication = self._publication
        if publication is not None:
            self._store.failed(publication, reason)
            # The rows are let go once the copy that may be under way has stopped writing them.
            try:
                self._copier.submit(publication.abort, reason)
            except RuntimeError:
                # The copier was shut down (the server's role is switched): no copy is under way.
                publication.abort(reason)

    def _fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        logger.warning("handoff %s is not published: %s", self._ticket.handoff_id, reason)
