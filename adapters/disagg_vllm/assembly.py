"""Builds the worker half from what vLLM registered: layout, staging, listeners, reader.

Loaded inside the engine only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from disagg_plugins.engine.rank import ENDS, Rank, TextIdentity
from disagg_plugins.errors import UnsupportedEngineError
from disagg_plugins.handoff.fingerprint import model_folder, rope_settings, weights_identity
from disagg_plugins.handoff.interfaces import Identity
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
from disagg_plugins.handoff.shards import head_range
from disagg_plugins.handoff.tickets import verify
from disagg_vllm import compat
from disagg_vllm.caches import HostCaches, layer_order, read_axes
from disagg_vllm.device_port import DevicePort
from disagg_vllm.host_port import HostPort
from disagg_vllm.names import ancestors, option_of
from disagg_vllm.packing import discover_packing
from disagg_vllm.worker_side import CachePort, WorkerSide

if TYPE_CHECKING:
    import torch

    from disagg_plugins.types import HandoffEvent
    from disagg_vllm.settings import Settings


def make_worker_side(
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: dict[str, torch.Tensor],
    settings: Settings,
    count: Callable[[str, float], None],
) -> tuple[WorkerSide, Any]:
    """Return the worker half of this rank and its channel to the gateway.

    Raises:
        UnsupportedEngineError: The caches cannot be read.
        ConfigError: No transport of the policy is installed.
    """
    names = layer_order(kv_caches)
    port, layout, ratio = make_port(vllm_config, kv_cache_config, kv_caches, names)
    tp_rank = get_tensor_model_parallel_rank()
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    identity = Identity(
        name=f"vllm {settings.worker} rank {tp_rank}/{tp_size}",
        fingerprint=make_fingerprint(vllm_config, layout),
        layout=layout,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )
    sides: list[WorkerSide] = []

    def on_event(event: HandoffEvent) -> None:
        if event.step in ENDS:
            count(event.step, 1)
            if sides:
                sides[0].publication_ended(event.handoff_id)

    rank = Rank(
        "vllm",
        identity,
        text_identity(vllm_config),
        settings,
        kv_tokens=kv_cache_config.num_blocks * layout.block_size_tokens * ratio,
        unpack=port.unpack,
        on_event=on_event,
    )
    side = WorkerSide(
        layer_names=names,
        port=port,
        layout=layout,
        block_ratio=ratio,
        store=rank.store,
        listeners=rank.listeners,
        endpoint=rank.endpoint,
        reader=rank.reader,
        verify=lambda text: verify(settings.secret, text, time.time()),
        count=count,
    )
    sides.append(side)
    return side, rank.reporter


def make_port(
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: dict[str, torch.Tensor],
    names: Sequence[str],
) -> tuple[CachePort, KVLayout, int]:
    """Return the port to the caches, the layout of staged rows, and kernel blocks per block."""
    model = vllm_config.model_config
    tp_rank = get_tensor_model_parallel_rank()
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    total_heads, head_dim = model.get_total_num_kv_heads(), model.get_head_size()
    first_head, end_head = head_range(tp_rank, tp_size, total_heads)
    heads = end_head - first_head
    layers = [kv_caches[name] for name in names]
    scheduler_block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    sizes = [s for s in range(scheduler_block, 0, -1) if scheduler_block % s == 0]
    axes, block_size = read_axes(
        layers[0].shape, block_sizes_tokens=sizes, num_heads=heads, head_dim=head_dim
    )
    forms = {(tuple(t.shape), t.stride()) for t in layers}
    if len(forms) != 1:
        raise UnsupportedEngineError(
            f"layers have KV caches of different shapes and strides: {sorted(map(str, forms))}"
        )
    dtype = compat.kv_cache_dtype(vllm_config)
    on_host = layers[0].device.type == "cpu"
    packing = None
    if on_host:
        if axes != ("b", "h", "t", "cd"):
            raise UnsupportedEngineError(f"a CPU cache with axes {axes} is not supported")
        isa = compat.layer_isa(vllm_config, names[0])
        packing = discover_packing(
            compat.cpu_write_block(isa),
            isa=isa,
            num_heads=heads,
            block_size_tokens=block_size,
            head_dim=head_dim,
            dtype=layers[0].dtype,
        )
    layout = KVLayout(
        num_layers=len(layers),
        num_kv_heads=total_heads,
        head_start=first_head,
        num_kv_heads_local=heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size_tokens=block_size,
        order="hctd" if on_host else "cthd",
        packing=packing.name if packing is not None else "plain",
    )
    ratio = scheduler_block // block_size
    if packing is not None:
        return HostPort(HostCaches(layers, layout.row_bytes), layout, packing), layout, ratio
    return DevicePort(layers, axes, layout), layout, ratio


def text_identity(vllm_config: Any) -> TextIdentity:
    """Return how this server turns requests into token ids.

    The template is the API server's, which is another process: its command line tells.
    """
    model = vllm_config.model_config
    template = next(
        filter(None, (option_of(argv, "--chat-template") for argv in ancestors())), None
    )
    return TextIdentity.of(str(model.tokenizer), model.tokenizer_revision, template)


def make_fingerprint(vllm_config: Any, layout: KVLayout) -> ModelFingerprint:
    """Return what a peer must share with this rank's model."""
    model = vllm_config.model_config
    return ModelFingerprint(
        model=weights_identity(model_folder(str(model.model), model.revision)),
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        rope=rope_settings(model.hf_text_config),
    )
