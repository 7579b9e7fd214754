"""``DisaggConnector``: the class that vLLM loads, one object in the scheduler, one in each worker.

Thin: it reads vLLM's objects, hands plain values to ``scheduler_side`` and ``worker_side``, and
answers in vLLM's terms. The order of calls is vLLM 0.32's ``kv_connector/v1/base.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from disagg_plugins.types import HandoffId
from disagg_vllm import compat
from disagg_vllm.scheduler_side import SchedulerSide, staged_block_bytes
from disagg_vllm.settings import Settings, read_settings
from disagg_vllm.stats import DisaggPromMetrics, DisaggStats, StatsCollector
from disagg_vllm.steps import StepPlan, StepResult

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from disagg_vllm.worker_side import WorkerSide


class StepMetadata(KVConnectorMetadata):
    """One step's plan on its way from the scheduler to the workers."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


class RankHandshake(KVConnectorHandshakeMetadata):
    """Where one rank serves its publications, on its way to the scheduler."""

    def __init__(self, endpoint: dict[str, object]) -> None:
        self.endpoint = endpoint


class RankResult(compat.WorkerMetadata):
    """What ranks did, on its way to the scheduler."""

    def __init__(self, result: StepResult) -> None:
        self.result = result

    def aggregate(self, other: RankResult) -> RankResult:
        """Return the sum of two ranks' results."""
        return RankResult(self.result.aggregate(other.result))


class DisaggConnector(KVConnectorBase_V1):
    """Hands KV from prefill workers to decode workers under one policy file.

    Configure with ``--kv-transfer-config '{"kv_connector":"DisaggConnector","kv_role":"kv_both",
    "kv_connector_extra_config":{"policy":"disagg.yaml"}}'``.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.join_engine_log()
        compat.check_supported(vllm_config, kv_cache_config)
        config = self._kv_transfer_config
        self._settings: Settings = read_settings(config.kv_connector_extra_config)
        self._stats = StatsCollector()
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        self._reporter: Any = None
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            # vLLM's default fails a request whose load failed; computing the prompt here is slower
            # and right. The scheduler reads the setting after it has made the connector.
            if self._settings.load_failure == "recompute":
                config.kv_load_failure_policy = "recompute"
            self._scheduler = self._make_scheduler_side()

    def _make_scheduler_side(self) -> SchedulerSide:
        settings, config = self._settings, self._vllm_config
        self._reporter = settings.make_reporter()
        return SchedulerSide(
            block_size_tokens=self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
            block_bytes=staged_block_bytes(self._kv_cache_config),
            staging_bytes=settings.policy.handoff.staging_bytes,
            staging_wait_s=settings.policy.handoff.staging_wait_s,
            tp_size=config.parallel_config.tensor_parallel_size,
            verify=lambda text, step: HandoffId(settings.verify(text, step).handoff_id),
            report=self._reporter.send,
            clock=time.monotonic,
        )

    # Scheduler half ------------------------------------------------------------------------

    def _scheduler_side(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("a scheduler method was called on a worker's connector")
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        """Read the handoff of a new request."""
        self._scheduler_side().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how many prompt tokens can be loaded beyond the local prefix cache."""
        return self._scheduler_side().num_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Take the blocks that the loaded tokens go to."""
        block_ids = blocks.get_block_ids()[0]
        self._scheduler_side().after_alloc(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return the plan of this step."""
        return StepMetadata(self._scheduler_side().take_plan(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Learn what the workers did in the last step."""
        result = getattr(connector_output, "kv_connector_worker_meta", None)
        if isinstance(result, RankResult):
            self._scheduler_side().take_result(result.result)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return the answer for the gateway; blocks are free at once, staging holds the copy."""
        return False, self._scheduler_side().request_finished(request)

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Learn where the ranks of this worker serve."""
        self._scheduler_side().endpoints = [
            m.endpoint for _, m in sorted(metadata.items()) if isinstance(m, RankHandshake)
        ]

    # Worker half ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Read the caches' layout and start serving."""
        from disagg_vllm.assembly import make_worker_side

        self._worker, self._reporter = make_worker_side(
            self._vllm_config, self._kv_cache_config, kv_caches, self._settings, self._stats.count
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return where this rank serves, for the scheduler half."""
        from disagg_plugins.handoff.endpoints import to_json

        return None if self._worker is None else RankHandshake(to_json([self._worker.endpoint])[0])

    def _plan(self) -> StepPlan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, StepMetadata) else StepPlan()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take the plan of the step that begins, and start its loads.

        vLLM asks for loads (``start_load_kv``) only behind the forward pass of a step that does
        not need them. Their blocks are ours by now, so they start here and can be done one step
        earlier.
        """
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.start_step(self._plan())
            self._worker.start_loads(self._plan())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads have started with the step."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only once it is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Publish one layer of what this step computed."""
        if self._worker is not None:
            self._worker.publish_layer(layer_name)

    def wait_for_save(self) -> None:
        """Close the step's publications; the copies need no block of the engine any more."""
        if self._worker is not None:
            self._worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return loads that ended, for engines that ask this way."""
        if self._worker is None:
            return None, None
        received, failed = self._worker.take_received()
        self._failed_blocks.update(*failed.values())
        return None, received

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return blocks of failed loads, for engines that ask this way."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return loads that ended and those of them that failed."""
        if self._worker is None:
            return compat.TransferResults()
        received, failed = self._worker.take_received()
        return compat.TransferResults(finished_recving=received, failed_recving=set(failed))

    def build_connector_worker_meta(self) -> Any:
        """Return what the scheduler half must know of this step."""
        result = self._worker.take_result() if self._worker is not None else None
        return None if result is None else RankResult(result)

    def shutdown(self) -> None:
        """Stop serving and loading."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None

    # Statistics and engine settings --------------------------------------------------------

    def get_kv_connector_stats(self) -> DisaggStats | None:
        """Return the counts since the last call."""
        if self._scheduler is not None:
            for name, amount in self._scheduler.counts.items():
                if name not in ("loaded", "load_failed"):
                    self._stats.count(name, amount)
            self._scheduler.counts.clear()
        return self._stats.drain()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DisaggStats:
        """Return counts that travelled as a plain mapping."""
        return DisaggStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> DisaggPromMetrics:
        """Return the counters for vLLM's metrics page."""
        return DisaggPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are published from Python between graph pieces."""
        return True
