"""``DisaggKVSender``: one request on an SGLang prefill worker. Loaded inside the engine only.

SGLang calls everything here in its scheduler thread; anything but ``failure_exception`` that raises
ends the server, so errors become the state ``Failed``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import BaseKVSender, KVPoll, KVTransferMetric

from disagg_plugins.errors import HandoffAborted
from disagg_sglang.manager import DisaggKVManager, page_array, told
from disagg_sglang.result import pack_result

if TYPE_CHECKING:
    from disagg_sglang.publishing import PagePublisher

logger = logging.getLogger(__name__)

POLLS = {
    "waiting": KVPoll.Bootstrapping,
    "open": KVPoll.WaitingForInput,
    "copying": KVPoll.Transferring,
    "done": KVPoll.Success,
    "failed": KVPoll.Failed,
}


class DisaggKVSender(BaseKVSender):
    """Publishes one request's KV; see ``srt/disaggregation/base/conn.py``, SGLang 0.5.23."""

    def __init__(
        self,
        mgr: DisaggKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self._address = bootstrap_addr
        self._publisher: PagePublisher | None = None
        self._problem = ""
        self._row = -1
        self._pages_left = 0
        # SGLang sets it before it sends a prefix that is in its cache, which an earlier forward
        # pass may still be writing; it belongs to exactly one ``send``.
        self._early_send_wait_event: Any = None

    def expect(self, req: Any) -> None:
        """Learn the prompt; this project's hook calls it before anything is polled."""
        try:
            if self.bootstrap_room is None:
                raise HandoffAborted("-", "the request has no bootstrap_room")
            self._publisher = self.kv_mgr.publisher(self._address, req.origin_input_ids)
        except Exception as error:
            self._problem = told(error)
            logger.warning("request %s is not published: %s", req.rid, self._problem)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        """Learn how many pages will come, and the metadata row."""
        self._row = -1 if aux_index is None else int(aux_index)
        self._pages_left = num_kv_indices
        if self._publisher is not None and num_kv_indices != self._publisher.num_pages:
            self._fail(
                f"SGLang announces {num_kv_indices} pages, the prompt has "
                f"{self._publisher.num_pages}"
            )

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        """Return whether a chunk is to be sent: also a last one without pages."""
        return num_pages > 0 or last_chunk

    def send(
        self, kv_indices: Any, state_indices: Any = None, num_kv_tokens: int | None = None
    ) -> None:
        """Publish the next pages; the metadata row is complete when the last ones come."""
        written, self._early_send_wait_event = self._early_send_wait_event, None
        if self._publisher is None or self._publisher.state == "failed":
            return
        try:
            pages = page_array(kv_indices)
            self._pages_left -= len(pages)
            self.kv_mgr.pool.check_pages(pages)
            last = self._pages_left <= 0
            result = pack_result(self.kv_mgr.metadata.read(self._row)) if last else b""
            self._publisher.send(pages, result, written=written)
        except Exception as error:
            self._fail(told(error))

    def poll(self) -> int:
        """Return how far the request is."""
        if self._publisher is None:
            # Not failed before the hook has told the prompt: SGLang polls only after that.
            self._problem = self._problem or "SGLang did not tell the prompt (hook not applied)"
            return KVPoll.Failed
        return POLLS[self._publisher.poll()]

    def _fail(self, reason: str) -> None:
        logger.warning("room %s is not published: %s", self.bootstrap_room, reason)
        if self._publisher is not None:
            self._publisher.abort(reason)

    def abort(self) -> None:
        """Give the request up; SGLang frees its pages right after."""
        if self._publisher is not None:
            self._publisher.abort("SGLang aborted the prefill")

    def failure_exception(self) -> None:
        """Raise why it failed; where another rank failed, this one gives up as well."""
        if self._publisher is not None:
            self._publisher.abort("another rank failed")
        raise HandoffAborted(str(self.bootstrap_room), self.failure)

    @property
    def failure(self) -> str:
        """Why it failed."""
        return self._problem or (self._publisher.reason if self._publisher else "")

    def get_transfer_metric(self) -> KVTransferMetric:
        """Return what staging took; also after ``clear``, where SGLang asks."""
        if self._publisher is None:
            return KVTransferMetric()
        return KVTransferMetric(
            transfer_latency_s=self._publisher.seconds,
            transfer_total_bytes=self._publisher.payload_bytes,
        )

    def clear(self) -> None:
        """Nothing to give back: the store owns what was published until its lease ends."""
