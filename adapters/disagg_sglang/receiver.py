"""``DisaggKVReceiver``: one request on an SGLang decode worker. Loaded inside the engine only.

SGLang calls everything here in its scheduler thread; anything but ``failure_exception`` that raises
ends the server, so errors become the state ``Failed``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import BaseKVReceiver, KVPoll

from disagg_plugins.errors import HandoffAborted
from disagg_sglang.manager import DisaggKVManager, page_array, told
from disagg_sglang.pools import PageSink

if TYPE_CHECKING:
    from disagg_sglang.loading import PageLoad

logger = logging.getLogger(__name__)

POLLS = {
    "idle": KVPoll.Bootstrapping,
    "ready": KVPoll.WaitingForInput,
    "loading": KVPoll.Transferring,
    "done": KVPoll.Success,
    "failed": KVPoll.Failed,
}


class DisaggKVReceiver(BaseKVReceiver):
    """Loads one request's KV; see ``srt/disaggregation/base/conn.py``, SGLang 0.5.23."""

    abort_notified = False
    require_staging = False

    def __init__(
        self, mgr: DisaggKVManager, bootstrap_addr: str, bootstrap_room: int | None = None
    ) -> None:
        self.kv_mgr = mgr
        self.bootstrap_room = bootstrap_room
        self._address = bootstrap_addr
        self._load: PageLoad | None = None
        self._num_tokens = 0
        self._problem = ""

    def expect(self, req: Any) -> None:
        """Learn the prompt; this project's hook calls it before anything is polled."""
        self._num_tokens = len(req.origin_input_ids)
        try:
            if self.bootstrap_room is None:
                raise HandoffAborted("-", "the request has no bootstrap_room")
            self._load = self.kv_mgr.load(self._address, req.origin_input_ids)
        except Exception as error:
            self._problem = told(error)
            logger.warning("request %s is not loaded: %s", req.rid, self._problem)

    def init(self, prefill_dp_rank: int) -> None:
        """Be ready for the pages."""
        if self._load is not None and self._load.state == "idle":
            self._load.state = "ready"

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: int | None = None,
        state_indices: Any = None,
        decode_prefix_len: int | None = None,
        destination: Any = None,
    ) -> None:
        """Take the pages and the metadata row, and start to load."""
        load, manager = self._load, self.kv_mgr
        if load is None or self.bootstrap_room is None:
            return
        try:
            pages, prefix = page_array(kv_indices), int(decode_prefix_len or 0)
            manager.pool.check_pages(pages)
            first_block, rest = divmod(prefix, manager.pool.layout.block_size_tokens)
            wanted = manager.pool.layout.num_blocks(self._num_tokens) - first_block
            if rest or len(pages) != wanted or aux_index is None:
                raise HandoffAborted(
                    "-", f"SGLang gives {len(pages)} pages for {wanted} after {prefix} tokens"
                )
            sink = PageSink(manager.pool, pages, first_block)
            row, room = int(aux_index), self.bootstrap_room
            load.start(
                sink,
                sink,
                prefix,
                lambda result: manager.metadata.write(row, room, result),
                free=manager.pages_free(),
            )
        except Exception as error:
            load.abort(told(error))

    def poll(self) -> int:
        """Return how far the request is."""
        if self._load is None:
            self._problem = self._problem or "SGLang did not tell the prompt (hook not applied)"
            return KVPoll.Failed
        return POLLS[self._load.state]

    @property
    def conclude_state(self) -> int | None:
        """How it ended, or None."""
        state = self.poll()
        return state if state in (KVPoll.Success, KVPoll.Failed) else None

    def abort(self) -> None:
        """Give the load up: no page is written after this."""
        if self._load is not None:
            self._load.abort("SGLang aborted the request")

    def failure_exception(self) -> None:
        """Raise why it failed; where another rank failed, this one gives up as well."""
        if self._load is not None:
            self._load.abort("another rank failed")
        reason = self._problem or (self._load.reason if self._load else "")
        raise HandoffAborted(str(self.bootstrap_room), reason)

    def clear(self) -> None:
        """Let go of the request: SGLang takes pages and metadata row back."""
        if self._load is not None and self._load.state != "done":
            self._load.abort("SGLang cleared the request")
