"""The KV connector pair that TensorRT-LLM loads, by ``kv_connector_config``::

    kv_connector_config:
      connector_module: disagg_trtllm.connector
      connector_scheduler_class: DisaggKvConnectorScheduler
      connector_worker_class: DisaggKvConnectorWorker

Written against the published interface, exercised on a host that follows it, not run on
TensorRT-LLM here. One class body serves both known eras (``compat.py``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from disagg_plugins.engine.rank import Rank, TextIdentity
from disagg_plugins.handoff.choice import choose_transport
from disagg_plugins.handoff.interfaces import Identity
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.plugins import PluginHost
from disagg_trtllm import compat
from disagg_trtllm.announcements import Announcements
from disagg_trtllm.fetching import Fetcher
from disagg_trtllm.geometry import Geometry, read_geometry
from disagg_trtllm.plan import Plan
from disagg_trtllm.scheduler_side import SchedulerSide
from disagg_trtllm.settings import Settings, read_settings
from disagg_trtllm.worker_side import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from disagg_plugins.types import HandoffPair

log = logging.getLogger(__name__)

ENGINE = "trtllm"

T = TypeVar("T")

SchedulerBase, WorkerBase = compat.base_classes()


class DisaggKvConnectorScheduler(SchedulerBase):  # type: ignore[misc, valid-type]
    """The scheduler half, on rank 0.

    Args:
        llm_args: TensorRT-LLM's ``TorchLlmArgs``.

    Raises:
        DisaggError: The model, the parallelism or the settings are not supported.
    """

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        settings, geometry = read_settings(), read_geometry(llm_args)
        self._host = PluginHost.load(settings.policy.plugins)
        self._host.start(settings.policy)
        self._reporter = settings.make_reporter()
        self._fetcher = make_fetcher(settings, geometry, self._host)
        self.side = SchedulerSide(
            settings,
            self._fetcher,
            block_size_tokens=geometry.block_size_tokens,
            report=self._reporter.send,
        )
        policy = settings.policy.handoff
        everywhere = policy.listen_host in ("0.0.0.0", "::")
        self._announcements = Announcements(
            policy.listen_host,
            self.side.announced,
            advertise_host=policy.advertise_host or (os.uname().nodename if everywhere else None),
        )
        self._reporter.send(
            {
                "kind": "hello",
                "engine": ENGINE,
                "announce": self._announcements.address,
                "pid": os.getpid(),
            }
        )

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return what can be loaded; called with the radix tree locked: no I/O, no waiting."""
        return _unraised(
            lambda: self.side.match(
                request.request_id, compat.tokens_of(request), num_computed_tokens
            ),
            (0, False),
        )

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Plan the load of this iteration; on rank 0 alone, so nothing is raised."""
        _unraised(lambda: self.side.allocated(request.request_id, block_ids), None)

    def build_connector_meta(self, scheduler_output: Any) -> Plan:
        """Return what every rank does in this iteration."""
        plan = _unraised(lambda: self.side.plan(*compat.entries(scheduler_output)), None)
        # an output that cannot be read must not lose the loads that were promised
        return self.side.pending() if plan is None else plan

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Forget the request; its blocks may go at once: what was published has been copied."""
        _unraised(lambda: self._finished(request), None)
        return False

    def wait_for_initialization(self) -> None:
        """There is nothing to wait for."""

    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """Newer interfaces; loads are over when they are told."""

    def request_reset(self, request: Any) -> None:
        """Newer interfaces; a request that begins anew computes its prompt."""
        _unraised(lambda: self._finished(request), None)

    def _finished(self, request: Any) -> None:
        self.side.finished(request.request_id, lambda: compat.tokens_of(request))

    def close(self) -> None:
        """Let go of everything; for hosts that end connectors."""
        self._announcements.close()
        self._fetcher.close()
        self._reporter.close()
        self._host.close()


class DisaggKvConnectorWorker(WorkerBase):  # type: ignore[misc, valid-type]
    """The worker half, on every rank.

    Args:
        llm_args: TensorRT-LLM's ``TorchLlmArgs``.

    Raises:
        DisaggError: The model, the parallelism or the settings are not supported.
    """

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._settings, self._geometry = read_settings(), read_geometry(llm_args)
        self._tp_rank = compat.rank()
        self.side: WorkerSide | None = None

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Take the rank's KV tensor, and introduce the rank to the gateway."""
        geometry, settings = self._geometry, self._settings
        dtype = str(kv_cache_tensor.dtype).removeprefix("torch.")
        geometry.check_tensor(tuple(kv_cache_tensor.shape), dtype, self._tp_rank)
        layout = geometry.layout(self._tp_rank)
        rank = Rank(
            ENGINE,
            Identity(
                name=f"{ENGINE} {settings.worker} rank {self._tp_rank}/{geometry.tp_size}",
                fingerprint=geometry.fingerprint(),
                layout=layout,
                tp_rank=self._tp_rank,
                tp_size=geometry.tp_size,
            ),
            TextIdentity.of(geometry.model, None, None),
            settings,
            kv_tokens=len(kv_cache_tensor) * layout.block_size_tokens,
        )
        self.side = WorkerSide(
            kv_cache_tensor,
            layout,
            geometry.layout(),
            rank,
            verify=lambda text: settings.verify(text, "prefill"),
            asynchronous=settings.asynchronous,
        )

    def start_load_kv(self, stream: Any) -> None:
        """Copy what was fetched into its blocks, once: the engine never clears what it bound.

        An iteration that binds nothing calls this with the plan of the one before, whose blocks may
        be another request's by then.
        """
        plan = self._plan()
        if self.side is not None and plan.load:
            self.side.load(plan, stream)
            plan.load = []

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Return: ``start_load_kv`` has copied all layers."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Return: a prompt is staged whole, at the end of the pass that completes it."""

    def wait_for_save(self, stream: Any) -> None:
        """Stage the prompts that this pass completed."""
        plan = self._plan()
        if self.side is not None and plan.publish:
            self.side.publish(plan, stream)
            plan.publish = []

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return which saves and loads are over; saves are over before the engine asks."""
        if self.side is None:
            return [], []
        return [], self.side.loaded(started_loading_req_ids)

    def close(self) -> None:
        """Let go of everything; for hosts that end connectors."""
        if self.side is not None:
            self.side.close()

    def _plan(self) -> Plan:
        plan = self.get_connector_meta()
        return plan if isinstance(plan, Plan) else Plan()


def make_fetcher(settings: Settings, geometry: Geometry, host: PluginHost) -> Fetcher:
    """Return what fetches prompts, as one decode rank that has all heads."""
    policy, layout = settings.policy.handoff, geometry.layout()
    transports = {n: t for n, t in host.transports().items() if n in policy.transports}

    def choose(pair: HandoffPair, offered: Sequence[str]) -> str:
        kinds = [(name, transports[name].capabilities) for name in offered if name in transports]
        return choose_transport(host, pair, kinds, policy.transports)

    reader = HandoffReader(
        identity=Identity(
            name=f"{ENGINE} {settings.worker} scheduler",
            fingerprint=geometry.fingerprint(),
            layout=layout,
        ),
        transports=transports,
        policy=policy,
        secret=settings.secret,
        choose=choose,
    )
    return Fetcher(layout, reader, staging_bytes=policy.staging_bytes, lease_s=policy.lease_s)


def _unraised(do: Callable[[], T], otherwise: T) -> T:
    """Return what ``do`` returns; where it raises, say so and return ``otherwise``."""
    try:
        return do()
    except Exception:
        log.exception("disagg: the connector failed; the request goes on without a handoff")
        return otherwise
