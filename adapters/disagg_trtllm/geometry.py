"""What a rank's KV tensor means: ``[num_blocks, num_layers, 2, heads * tokens * dim]``, HND."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from disagg_plugins.errors import UnsupportedEngineError
from disagg_plugins.handoff.fingerprint import model_folder, rope_settings, weights_identity
from disagg_plugins.handoff.layouts import ELEMENT_BYTES, KVLayout, ModelFingerprint
from disagg_plugins.handoff.shards import head_range

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_CONFIG_BYTES = 1 << 20

NEEDS_ONE = {
    "pipeline_parallel_size": "pipeline parallelism",
    "context_parallel_size": "context parallelism",
    "max_beam_width": "beam search",
}
REFUSED = {"enable_attention_dp": "attention data parallelism"}

WINDOWS = ("max_attention_window",)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the connector knows of the model and its cache before a tensor is there.

    Attributes:
        model: The model's folder, or its name.
        layers: Layers.
        heads: KV heads of the model.
        head_dim: Elements of one head.
        block_size_tokens: Tokens of one block.
        dtype: Of KV.
        tp_size: Ranks.
        rope: See ``ModelFingerprint``.
    """

    model: str
    layers: int
    heads: int
    head_dim: int
    block_size_tokens: int
    dtype: str
    tp_size: int
    rope: str

    def layout(self, tp_rank: int | None = None) -> KVLayout:
        """Return the layout of one rank; None: of all heads together."""
        start, end = 0, self.heads
        if tp_rank is not None:
            start, end = head_range(tp_rank, self.tp_size, self.heads)
        return KVLayout(
            num_layers=self.layers,
            num_kv_heads=self.heads,
            head_start=start,
            num_kv_heads_local=end - start,
            head_dim=self.head_dim,
            dtype=self.dtype,
            block_size_tokens=self.block_size_tokens,
            order="chtd",
        )

    def fingerprint(self) -> ModelFingerprint:
        """Return what a peer must share."""
        return ModelFingerprint(
            model=weights_identity(self.model),
            dtype=self.dtype,
            num_layers=self.layers,
            num_kv_heads=self.heads,
            head_dim=self.head_dim,
            rope=self.rope,
        )

    def check_tensor(self, shape: Sequence[int], dtype: str, tp_rank: int) -> None:
        """Refuse a KV tensor that is not what it was taken for.

        Args:
            shape: Of the tensor.
            dtype: Of the tensor, as ``bfloat16``.
            tp_rank: Of this rank.

        Raises:
            UnsupportedEngineError: It is another one; the text says in what.
        """
        layout = self.layout(tp_rank)
        row = layout.row_bytes // layout.element_bytes // 2
        expected = (self.layers, 2, row)
        if len(shape) != 4 or tuple(shape[1:]) != expected:
            raise UnsupportedEngineError(
                f"the KV tensor has the shape {tuple(shape)}; expected are [blocks, "
                f"{self.layers} layers, 2, {row}] for {layout.num_kv_heads_local} KV heads of "
                f"{self.head_dim}, {self.block_size_tokens} tokens a block. Layers of several "
                "kinds (sliding windows, several pools) and MLA are not supported"
            )
        if dtype != self.dtype:
            raise UnsupportedEngineError(
                f"the KV tensor is {dtype}, the configuration says {self.dtype}: set "
                "kv_cache_config.dtype"
            )


def read_geometry(llm_args: Any) -> Geometry:
    """Return the geometry of what ``llm_args`` describes (``TorchLlmArgs``).

    Raises:
        UnsupportedEngineError: It describes what the connector does not do.
    """
    for name, what in NEEDS_ONE.items():
        value = getattr(llm_args, name, None)
        if value is not None and value != 1:
            raise UnsupportedEngineError(f"{what} is not supported ({name} is {value!r})")
    for name, what in REFUSED.items():
        if getattr(llm_args, name, False):
            raise UnsupportedEngineError(f"{what} is not supported ({name} is set)")
    cache = getattr(llm_args, "kv_cache_config", None)
    for name in WINDOWS:
        if getattr(cache, name, None):
            raise UnsupportedEngineError(
                f"sliding windows are not supported (kv_cache_config.{name} is set)"
            )
    folder = model_folder(str(llm_args.model))
    config = _read_config(folder)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedEngineError(
            f"sliding windows are not supported (config.json of {folder}: sliding_window)"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedEngineError(f"MLA is not supported (config.json of {folder})")
    heads = int(getattr(config, "num_key_value_heads", config.num_attention_heads))
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(
        model=folder,
        layers=int(config.num_hidden_layers),
        heads=heads,
        head_dim=int(dim),
        block_size_tokens=int(getattr(cache, "tokens_per_block", None) or 32),
        dtype=_dtype(llm_args, cache, config),
        tp_size=int(getattr(llm_args, "tensor_parallel_size", 1) or 1),
        rope=rope_settings(config),
    )


def _dtype(llm_args: Any, cache: Any, config: Any) -> str:
    told = (
        getattr(cache, "dtype", None),
        getattr(llm_args, "dtype", None),
        getattr(config, "dtype", None),
        getattr(config, "torch_dtype", None),
    )
    for each in told:
        name = str(each).removeprefix("torch.")
        if each is not None and name != "auto":
            name = {"fp8": "float8_e4m3fn"}.get(name, name)
            if name not in ELEMENT_BYTES:
                raise UnsupportedEngineError(f"a KV cache of {name} is not supported")
            return name
    raise UnsupportedEngineError(
        "nothing says the dtype of the KV cache: set kv_cache_config.dtype"
    )


def _read_config(folder: str) -> SimpleNamespace:
    path = Path(folder) / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UnsupportedEngineError(f"{path} has more than 1 MiB")
        said = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise UnsupportedEngineError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(said, dict):
        raise UnsupportedEngineError(f"{path} is no JSON object")
    text = said.get("text_config")
    return SimpleNamespace(**(text if isinstance(text, dict) else said))
