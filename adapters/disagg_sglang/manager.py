"""``DisaggKVManager``: what one SGLang rank's requests share. Loaded inside the engine only."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer, BaseKVManager

from disagg_plugins.engine.rank import Rank
from disagg_plugins.errors import DisaggError, UnsupportedEngineError
from disagg_sglang import compat, patches
from disagg_sglang.device_pool import DevicePool
from disagg_sglang.loading import PageLoad
from disagg_sglang.metadata import MetadataRows
from disagg_sglang.pools import HostPool
from disagg_sglang.publishing import PagePublisher
from disagg_sglang.room import unpack_room
from disagg_sglang.settings import read_settings

logger = logging.getLogger(__name__)

LOADER_THREADS = 256
"""Loads at once. A load may wait for its prefill, so there are as many as requests may run."""


class PrefillInfo:
    """What SGLang asks about a prefill worker: one data-parallel rank."""

    dp_size = 1
    follow_bootstrap_room = False


class EveryPrefill:
    """SGLang's table of prefill workers: the policy knows them, so every address is known."""

    def get(self, address: str, default: object = None) -> PrefillInfo:
        """Return what is known of any address."""
        return PrefillInfo()


class DisaggKVManager(BaseKVManager):
    """Publishes and loads for one rank; see ``srt/disaggregation/base/conn.py``, SGLang 0.5.23."""

    supports_role_switch = True

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False
    ) -> None:
        compat.join_engine_log()
        patches.check_applied()
        queue = patches.queue_in_making.get()
        if queue is None:
            raise UnsupportedEngineError(
                "SGLang makes KV managers elsewhere than this release expects (0.5.23)"
            )
        compat.check_supported(args, server_args, queue, is_mla=bool(is_mla_backend))
        self.kv_args = args
        self.is_mla_backend = False
        self.prefill_info_table = EveryPrefill()
        self.settings = read_settings(server_args.port)
        identity = compat.make_identity(queue, server_args, self.settings)
        kv_pool = queue.token_to_kv_pool
        self._scheduler = queue.scheduler
        self._on_host = on_host = kv_pool.k_buffer[0].device.type == "cpu"
        pool = HostPool if on_host else DevicePool
        self.pool = pool(kv_pool.k_buffer, kv_pool.v_buffer, identity.layout)
        self.metadata = MetadataRows(queue.metadata_buffers, args.aux_data_ptrs, args.aux_item_lens)
        text, slots = compat.text_identity(server_args), int(kv_pool.k_buffer[0].shape[0])
        self.rank = Rank("sglang", identity, text, self.settings, kv_tokens=slots)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="disagg-publish")
        self._loader = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="disagg-load")

    # What SGLang calls ---------------------------------------------------------------------

    def register_to_bootstrap(self) -> None:
        """Nothing to register: workers introduce themselves to the gateway."""

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Answer that a prefill worker is known: the ticket names it."""
        return True

    def submit_prefill_recompute(self, receiver: Any, payload: object) -> None:
        """Refuse what SGLang asks after weights were changed under a running request."""
        receiver.abort()

    def teardown(self) -> None:
        """Stop serving and loading; SGLang calls it when the role is switched."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._copier.shutdown(wait=True)
        self.rank.close()

    # For senders and receivers -------------------------------------------------------------

    def publisher(self, bootstrap_addr: str, token_ids: Any) -> PagePublisher:
        """Return the publication-to-be of a request.

        Raises:
            DisaggError: Its ticket is missing, false, or for another worker.
        """
        room = unpack_room(bootstrap_addr)
        return PagePublisher(
            self.settings.verify(room.ticket, "prefill"),
            token_ids,
            store=self.rank.store,
            pool=self.pool,
            copier=self._copier,
            staging_wait_s=self.settings.policy.handoff.staging_wait_s,
        )

    def load(self, bootstrap_addr: str, token_ids: Any) -> PageLoad:
        """Return the load-to-be of a request.

        Raises:
            DisaggError: Its ticket is missing, false or for another worker, or it names no place
                to load from.
        """
        room = unpack_room(bootstrap_addr)
        return PageLoad(
            self.settings.verify(room.ticket, "decode"),
            room,
            token_ids,
            reader=self.rank.reader,
            executor=self._loader,
            wait_s=self.settings.policy.gateway.prefill_s,
            report=self._report if self.rank.identity.tp_rank == 0 else _nothing,
        )

    def pages_free(self) -> Any:
        """Return the event after which nobody writes pages that SGLang gives out now, or None.

        Overlapped scheduling has launched one more forward pass of a request when it learns that
        the request has finished; that pass still writes into the pages that are given away.
        """
        if self._on_host or not self._scheduler.enable_overlap:
            return None
        return self._scheduler.forward_stream.record_event()

    def _report(self, report: dict[str, object]) -> None:
        if isinstance(payload := report.get("bytes"), int):
            # One rank tells for all; the ranks' shares are equal.
            report = {**report, "bytes": payload * self.rank.identity.tp_size}
        self.rank.reporter.send(report)


class DisaggBootstrapServer(BaseKVBootstrapServer):
    """Listens nowhere: the gateway knows the workers, and tickets name them."""

    def __init__(self, host: str, port: int) -> None:
        pass


def page_array(indices: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return page indices of SGLang's as int64, copied: SGLang may use the array again."""
    return np.array(indices, dtype=np.int64)


def told(error: Exception) -> str:
    """Return what is told of an error that fails one request; what it was, where it is a bug.

    Nothing that goes wrong with one request may reach SGLang's scheduler, which would end.
    """
    if isinstance(error, DisaggError):
        return str(error)
    logger.error("a request failed inside of the transfer backend", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _nothing(report: dict[str, object]) -> None:
    pass
