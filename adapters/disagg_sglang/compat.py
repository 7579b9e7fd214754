"""What this adapter takes from SGLang's objects, and what it refuses at start-up.

Names are SGLang 0.5.23's. Loaded inside the engine only.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import sglang
from sglang.srt.runtime_context import get_parallel

from disagg_plugins.engine.rank import TextIdentity
from disagg_plugins.errors import UnsupportedEngineError
from disagg_plugins.handoff.fingerprint import model_folder, rope_settings, weights_identity
from disagg_plugins.handoff.interfaces import Identity
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
from disagg_plugins.handoff.shards import head_range

if TYPE_CHECKING:
    from disagg_plugins.engine.settings import WorkerSettings

VERSION = str(sglang.__version__)


def check_supported(kv_args: Any, server_args: Any, queue: Any, *, is_mla: bool) -> None:
    """Refuse at start-up what would otherwise go wrong silently.

    Args:
        kv_args: SGLang's ``KVArgs``.
        server_args: SGLang's ``ServerArgs``.
        queue: The queue that makes the manager.
        is_mla: Whether the pool is of a latent-attention model.

    Raises:
        UnsupportedEngineError: Something this adapter cannot hand over is switched on.
    """
    refusals = (
        (is_mla, "latent attention (MLA) keeps KV in another form: serve this model unsplit"),
        (
            bool(kv_args.state_types),
            f"the model has state beside KV ({[str(t) for t in kv_args.state_types]}): only full "
            "attention can be handed over",
        ),
        (
            queue.draft_token_to_kv_pool is not None or server_args.speculative_algorithm,
            "speculative decoding is not supported with a handoff yet: remove the --speculative "
            "flags",
        ),
        (server_args.pp_size > 1, "--pp-size above 1 is not supported: use tensor parallelism"),
        (
            server_args.dp_size > 1,
            "--dp-size above 1 is not supported: start one server for each replica and name each "
            "in the policy",
        ),
        (
            get_parallel().attn_cp_size > 1 or queue.scheduler.kv_shard_widening > 1,
            "context parallelism spreads one page over ranks: use tensor parallelism",
        ),
        (
            server_args.disaggregation_enable_kv_checksum,
            "--disaggregation-enable-kv-checksum is not supported: the handoff authenticates its "
            "peers and binds KV to its prompt; remove the flag",
        ),
        (
            server_args.disaggregation_decode_allocation_policy != "early",
            "--disaggregation-decode-allocation-policy must be early",
        ),
        (
            server_args.disaggregation_decode_host_receive_threshold < 1,
            "--disaggregation-decode-host-receive-threshold is not supported",
        ),
        (
            queue.metadata_buffers.output_ids.device.type != "cpu",
            "SGLang keeps its metadata on a device (NVLink pools or NPU): not supported",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise UnsupportedEngineError(why)
    _check_pool(queue.token_to_kv_pool, str(queue.scheduler.model_config.dtype))


def _check_pool(pool: Any, model_dtype: str) -> None:
    kind = type(pool).__name__
    buffers = [*getattr(pool, "k_buffer", ()), *getattr(pool, "v_buffer", ())]
    if not buffers:
        raise UnsupportedEngineError(f"the KV pool {kind} has no K and V buffers of layers")
    forms = {(tuple(b.shape), b.stride(), b.is_contiguous()) for b in buffers}
    if len(forms) != 1 or not buffers[0].is_contiguous():
        raise UnsupportedEngineError(f"layers of the KV pool {kind} differ in shape: {forms}")
    if tuple(buffers[0].shape[1:]) != (pool.head_num, pool.head_dim):
        raise UnsupportedEngineError(
            f"the KV pool {kind} has buffers of shape {tuple(buffers[0].shape)}, not [slots, "
            f"{pool.head_num} heads, {pool.head_dim}]: use the NHD layout"
        )
    if str(pool.dtype) != model_dtype or pool.dtype != pool.store_dtype:
        raise UnsupportedEngineError(
            f"KV of {pool.dtype} with a {model_dtype} model: quantised KV is not handed over yet; "
            "use --kv-cache-dtype auto"
        )


def make_identity(queue: Any, server_args: Any, settings: WorkerSettings) -> Identity:
    """Return who this rank is, with its model and layout."""
    pool, model = queue.token_to_kv_pool, queue.scheduler.model_config
    parallel = get_parallel()
    tp_rank, tp_size = parallel.attn_tp_rank, parallel.attn_tp_size
    total_heads = model.get_total_num_kv_heads()
    first_head, end_head = head_range(tp_rank, tp_size, total_heads)
    if end_head - first_head != pool.head_num:
        raise UnsupportedEngineError(
            f"rank {tp_rank} of {tp_size} holds {pool.head_num} KV heads, expected "
            f"{end_head - first_head} of {total_heads}"
        )
    layout = KVLayout(
        num_layers=len(pool.k_buffer),
        num_kv_heads=total_heads,
        head_start=first_head,
        num_kv_heads_local=pool.head_num,
        head_dim=pool.head_dim,
        dtype=str(pool.dtype).removeprefix("torch."),
        block_size_tokens=pool.page_size,
        order="cthd",
    )
    fingerprint = ModelFingerprint(
        model=weights_identity(model_folder(server_args.model_path, server_args.revision)),
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=total_heads,
        head_dim=layout.head_dim,
        rope=rope_settings(model.hf_text_config),
    )
    return Identity(
        name=f"sglang {settings.worker} rank {tp_rank}/{tp_size}",
        fingerprint=fingerprint,
        layout=layout,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def text_identity(server_args: Any) -> TextIdentity:
    """Return how this server turns requests into token ids."""
    tokenizer = server_args.tokenizer_path or server_args.model_path
    return TextIdentity.of(tokenizer, server_args.revision, server_args.chat_template)


def join_engine_log() -> None:
    """Let what this project logs be seen as SGLang's own lines are."""
    for name in ("disagg_plugins", "disagg_sglang", "disagg_kv_shm", "disagg_kv_tcp"):
        logging.getLogger(name).setLevel(logging.getLogger().getEffectiveLevel())
