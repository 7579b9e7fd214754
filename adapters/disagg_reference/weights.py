"""The weights of a model folder, cut for the ranks of one engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from disagg_plugins.errors import ConfigError
from disagg_reference.pool import DTYPES

if TYPE_CHECKING:
    from disagg_reference.config import ModelConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One rank's part of one layer; heads and MLP columns are shared out, norms are not.

    Attributes:
        qkv: shape ``((heads + 2 * kv_heads) * head_dim, hidden)``.
        out: shape ``(hidden, heads * head_dim)``.
        gate_up: shape ``(2 * intermediate, hidden)``.
        down: shape ``(hidden, intermediate)``.
        before_attention: shape ``(hidden,)``.
        before_mlp: shape ``(hidden,)``.
    """

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    before_attention: torch.Tensor
    before_mlp: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model.

    Attributes:
        embedding: shape ``(vocab_size, hidden)``.
        head: shape ``(vocab_size, hidden)``.
        norm: shape ``(hidden,)``.
        ranks: For each rank, its part of each layer.
    """

    embedding: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    ranks: tuple[tuple[LayerWeights, ...], ...]


def load_weights(
    folder: Path, config: ModelConfig, *, tp_size: int, dtype: str, device: torch.device
) -> Weights:
    """Read a folder's safetensors.

    Raises:
        ConfigError: A file or tensor is missing, or has another shape.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as exc:
                raise ConfigError(f"cannot be read: {exc}", file=str(path)) from exc
            where |= dict.fromkeys(file.keys(), file)

        def read(name: str, *shape: int) -> torch.Tensor:
            if name not in where:
                raise ConfigError(f"there is no tensor {name}", file=str(folder))
            found: torch.Tensor = where[name].get_tensor(name)
            if tuple(found.shape) != shape:
                raise ConfigError(
                    f"{name} has the shape {tuple(found.shape)}, not {shape}", file=str(folder)
                )
            return found.to(device, DTYPES[dtype])

        return _cut(config, read, tp_size)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ConfigError(f"is no index of weights: {exc!r}", file=str(index)) from exc
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"names a file outside its folder: {name!r:.80}", file=str(index))
    return [folder / name for name in sorted(names)]


def _cut(config: ModelConfig, read: Callable[..., torch.Tensor], tp_size: int) -> Weights:
    config.check_tp(tp_size)
    hidden, wide = config.hidden, config.intermediate
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ranks: list[list[LayerWeights]] = [[] for _ in range(tp_size)]
    for layer in range(config.num_layers):
        base = f"model.layers.{layer}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        q = read(f"{attention}.q_proj.weight", queries, hidden).chunk(tp_size)
        k = read(f"{attention}.k_proj.weight", keys, hidden).chunk(tp_size)
        v = read(f"{attention}.v_proj.weight", keys, hidden).chunk(tp_size)
        o = read(f"{attention}.o_proj.weight", hidden, queries).chunk(tp_size, dim=1)
        gate = read(f"{mlp}.gate_proj.weight", wide, hidden).chunk(tp_size)
        up = read(f"{mlp}.up_proj.weight", wide, hidden).chunk(tp_size)
        down = read(f"{mlp}.down_proj.weight", hidden, wide).chunk(tp_size, dim=1)
        norms = (
            read(f"{base}.input_layernorm.weight", hidden),
            read(f"{base}.post_attention_layernorm.weight", hidden),
        )
        for rank, layers in enumerate(ranks):
            layers.append(
                LayerWeights(
                    torch.cat([q[rank], k[rank], v[rank]]),
                    o[rank].contiguous(),
                    torch.cat([gate[rank], up[rank]]),
                    down[rank].contiguous(),
                    *norms,
                )
            )
    embedding = read("model.embed_tokens.weight", config.vocab_size, hidden)
    head = embedding if config.tied else read("lm_head.weight", config.vocab_size, hidden)
    return Weights(embedding, head, read("model.norm.weight", hidden), tuple(map(tuple, ranks)))
