"""Builds the worker half from what vLLM registered: layout, staging, listeners, reader.

Loaded inside the engine only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from disagg_plugins.errors import ConfigError, UnsupportedEngineError
from disagg_plugins.handoff.choice import choose_transport
from disagg_plugins.handoff.endpoints import local_host_id
from disagg_plugins.handoff.fingerprint import weights_identity
from disagg_plugins.handoff.interfaces import Endpoint, Identity, Listener
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
from disagg_plugins.handoff.publications import PublicationStore
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.handoff.shards import head_range
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.plugins import PluginHost
from disagg_vllm import compat
from disagg_vllm.caches import HostCaches, layer_order, read_axes
from disagg_vllm.device_port import DevicePort
from disagg_vllm.host_port import HostPort
from disagg_vllm.packing import discover_packing
from disagg_vllm.worker_side import CachePort, WorkerSide

if TYPE_CHECKING:
    import torch

    from disagg_plugins.types import HandoffEvent, HandoffPair
    from disagg_vllm.settings import Settings

logger = logging.getLogger(__name__)

ENDS = ("consumed", "expired", "failed")


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
    host = PluginHost.load(settings.policy.plugins)
    host.start(settings.policy)
    handoff = settings.policy.handoff
    reporter = settings.make_reporter()
    sides: list[WorkerSide] = []

    def on_event(event: HandoffEvent) -> None:
        host.connector.on_handoff(event)
        if event.step in ENDS:
            count(event.step, 1)
            if sides:
                sides[0].publication_ended(event.handoff_id)
        if tp_rank == 0 and event.step in ("published", *ENDS):
            reporter.send(_publisher_report(event, layout, tp_size))

    store = PublicationStore(
        identity=identity,
        arena=StagingArena(handoff.staging_bytes),
        policy=handoff,
        secret=settings.secret,
        unpack=port.unpack,
        on_event=on_event,
    )
    transports = {n: t for n, t in host.transports().items() if n in handoff.transports}
    for name in handoff.transports:
        if name not in transports:
            logger.warning("disagg: handoff.transports names %r, which is not installed", name)
    listeners, addresses = _listen(transports, store, identity, settings)

    def choose(pair: HandoffPair, offered: Sequence[str]) -> str:
        kinds = [(name, transports[name].capabilities) for name in offered if name in transports]
        return choose_transport(host, pair, kinds, handoff.transports)

    side = WorkerSide(
        layer_names=names,
        port=port,
        layout=layout,
        block_ratio=ratio,
        store=store,
        listeners=listeners,
        endpoint=Endpoint(tp_rank, tp_size, local_host_id(), addresses),
        reader=HandoffReader(
            identity=identity,
            transports=transports,
            policy=handoff,
            secret=settings.secret,
            choose=choose,
        ),
        verify=lambda text: verify(settings.secret, text, time.time()),
        count=count,
    )
    sides.append(side)
    reporter.send(_hello(identity, settings.worker))
    logger.info(
        "disagg: %s serves KV at %s, layout %s, fingerprint %s",
        identity.name,
        addresses,
        layout,
        identity.fingerprint.digest(),
    )
    return side, reporter


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


def make_fingerprint(vllm_config: Any, layout: KVLayout) -> ModelFingerprint:
    """Return what a peer must share with this rank's model."""
    return ModelFingerprint(
        model=weights_identity(compat.model_folder(vllm_config)),
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        rope=compat.rope_settings(vllm_config),
    )


def _listen(
    transports: dict[str, Any], store: PublicationStore, identity: Identity, settings: Settings
) -> tuple[list[Listener], dict[str, str]]:
    if not transports:
        raise ConfigError(
            f"none of {settings.policy.handoff.transports} is installed",
            key="handoff.transports",
            fix="disagg plugins lists what is",
        )
    listeners: list[Listener] = []
    addresses: dict[str, str] = {}
    try:
        for name, transport in transports.items():
            listener = transport.listen(
                store, identity, secret=settings.secret, policy=settings.policy.handoff
            )
            listeners.append(listener)
            addresses[name] = listener.address
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners, addresses


def _publisher_report(event: HandoffEvent, layout: KVLayout, tp_size: int) -> dict[str, Any]:
    report: dict[str, Any] = {"handoff_id": event.handoff_id}
    if event.step == "published":
        num_tokens = int(event.detail.get("tokens", 0))
        report.update(
            kind="published",
            num_tokens=num_tokens,
            bytes=layout.staged_bytes(num_tokens) * tp_size,
            seconds=event.detail.get("seconds", 0.0),
        )
    else:
        report.update(kind="ended", outcome=event.step)
        if "problem" in event.detail:
            report["problem"] = event.detail["problem"]
    return report


def _hello(identity: Identity, worker: str) -> dict[str, Any]:
    import os

    layout = identity.layout
    return {
        "kind": "hello",
        "worker": worker,
        "engine": "vllm",
        "tp_rank": identity.tp_rank,
        "tp_size": identity.tp_size,
        "fingerprint": identity.fingerprint.digest(),
        "layout": (
            f"{layout.order} {layout.packing} block {layout.block_size_tokens} {layout.dtype}"
        ),
        "pid": os.getpid(),
    }
