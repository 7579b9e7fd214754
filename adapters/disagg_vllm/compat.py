"""Every difference between vLLM releases, told apart by what is there rather than by version.

Imports vLLM; loaded inside the engine only.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base

from disagg_plugins.errors import UnsupportedEngineError

TransferResults: Any = getattr(base, "KVConnectorTransferResults", None)
"""Completions and failures in one snapshot (vLLM 0.32); absent before, where failures are told by
block (``get_block_ids_with_load_errors``)."""

WorkerMetadata: Any = getattr(base, "KVConnectorWorkerMetadata", object)
"""Base of what workers tell the scheduler half (vLLM 0.32); without it nothing is told."""


def kv_cache_dtype(vllm_config: Any) -> str:
    """Return the dtype of KV elements as torch spells it without the prefix.

    Raises:
        UnsupportedEngineError: The cache is quantised with scales of its own.
    """
    setting = vllm_config.cache_config.cache_dtype
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if setting in ("auto", model_dtype):
        return model_dtype
    raise UnsupportedEngineError(
        f"--kv-cache-dtype {setting} with a {model_dtype} model: quantised KV carries scales that "
        "are not handed over yet; use --kv-cache-dtype auto"
    )


def _cached_request_fields() -> frozenset[str]:
    from dataclasses import fields

    from vllm.v1.core.sched.output import CachedRequestData

    return frozenset(f.name for f in fields(CachedRequestData))


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse at start-up what would otherwise go wrong silently.

    Raises:
        UnsupportedEngineError: An older vLLM, several KV-cache groups, pipeline or context
            parallelism, latent attention, or speculative decoding.
    """
    missing = [
        name
        for name, there in (
            ("KVConnectorWorkerMetadata", WorkerMetadata is not object),
            ("CachedRequestData.resumed_req_ids", "resumed_req_ids" in _cached_request_fields()),
        )
        if not there
    ]
    if missing:
        raise UnsupportedEngineError(
            f"this vLLM has no {' and no '.join(missing)}: it is older than what this release was "
            "written for (0.32); upgrade vLLM"
        )
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted(type(g.kv_cache_spec).__name__ for g in groups))
        raise UnsupportedEngineError(
            f"the model has {len(groups)} KV-cache groups ({kinds}); only models with one group of "
            "full attention can be handed over: serve this model without the connector"
        )
    spec = type(groups[0].kv_cache_spec).__name__
    if spec not in ("FullAttentionSpec", "UniformTypeKVCacheSpecs"):
        raise UnsupportedEngineError(
            f"the model's KV cache is of kind {spec}; only full attention can be handed over"
        )
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedEngineError(
                f"{name}={getattr(parallel, name)} is not supported; use tensor parallelism"
            )
    if vllm_config.speculative_config is not None:
        raise UnsupportedEngineError(
            "speculative decoding is not supported with a handoff yet: draft layers have KV of "
            "their own; remove --speculative-config"
        )


def cpu_write_block(isa: str) -> Any:
    """Return a function that stores K and V into a one-block cache with the engine's own kernel."""
    import torch
    from vllm import _custom_ops as ops

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor) -> None:
        key_cache, value_cache = cache.chunk(2, dim=2)
        slots = torch.arange(key.shape[0], dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    return write


def layer_isa(vllm_config: Any, layer_name: str) -> str:
    """Return the instruction set that vLLM's CPU attention chose for a layer.

    Raises:
        UnsupportedEngineError: The layer does not say.
    """
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    isa = getattr(layer, "isa", None)
    if not isinstance(isa, str):
        raise UnsupportedEngineError(
            f"vLLM's CPU attention layer {layer_name!r} does not say its instruction set (isa); "
            "this vLLM release is not supported on CPU"
        )
    return isa


def join_engine_log() -> None:
    """Send what this project logs where vLLM's own lines go; idempotent."""
    engine = logging.getLogger("vllm")
    for name in ("disagg_plugins", "disagg_vllm", "disagg_kv_shm", "disagg_kv_tcp"):
        ours = logging.getLogger(name)
        if engine.handlers and not ours.handlers:
            for handler in engine.handlers:
                ours.addHandler(handler)
            ours.setLevel(engine.getEffectiveLevel())
            ours.propagate = False
