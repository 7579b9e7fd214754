"""What a model folder's ``config.json`` says, checked: Llama architecture and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from disagg_plugins.errors import ConfigError

NAME = "config.json"
MAX_CONFIG_BYTES = 1 << 20
RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings, by the names of Hugging Face's ``rope_parameters``.

    Attributes:
        factor: Of ``linear`` and ``llama3``.
        original_tokens: Context that the model was trained with; ``llama3``.
    """

    type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama model.

    Attributes:
        vocab_size: Tokens.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: KV heads; each serves ``num_heads / num_kv_heads`` query heads.
        head_dim: Elements of one head.
        max_tokens: Longest context.
        rms_eps: Of RMSNorm.
        tied: Whether the output head is the embedding.
        eos: Tokens that end an answer.
    """

    vocab_size: int
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_tokens: int
    rms_eps: float
    tied: bool
    rope: Rope
    eos: frozenset[int]

    def check_tp(self, tp_size: int) -> None:
        """Refuse a number of ranks that does not divide the heads.

        Raises:
            ConfigError: It does not.
        """
        if tp_size < 1 or self.num_kv_heads % tp_size or self.num_heads % tp_size:
            raise ConfigError(
                f"{self.num_heads} heads and {self.num_kv_heads} KV heads cannot be shared by "
                f"{tp_size} ranks",
                key="tp_size",
                fix="choose a number that divides both",
            )
        if self.intermediate % tp_size:
            raise ConfigError(f"an MLP of {self.intermediate} cannot be shared by {tp_size} ranks")


def read_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a model folder.

    Raises:
        ConfigError: It is missing, no JSON object, or describes another architecture.
    """
    return config_of(_read(folder), file=str(folder / NAME))


def raw_config(folder: Path) -> SimpleNamespace:
    """Return all of ``config.json`` as attributes.

    Raises:
        ConfigError: It is missing, or no JSON object.
    """
    return SimpleNamespace(**_read(folder))


def _read(folder: Path) -> dict[str, object]:
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError("it has more than 1 MiB", file=str(path))
        said = json.loads(path.read_text())
    except OSError as exc:
        fix = "name a folder in Hugging Face's form"
        raise ConfigError(f"cannot be read: {exc.strerror}", file=str(path), fix=fix) from exc
    except ValueError as exc:
        raise ConfigError(f"is no JSON: {exc}", file=str(path)) from exc
    if not isinstance(said, dict):
        raise ConfigError("is no JSON object", file=str(path))
    return said


def config_of(said: Mapping[str, object], *, file: str | None = None) -> ModelConfig:
    """Return the configuration of a parsed ``config.json``.

    Raises:
        ConfigError: Another architecture, a bias or an activation that Llama lacks, unknown
            rotary settings, or a number that is missing.
    """
    values = _Values(said, file)
    kind = said.get("model_type")
    if kind != "llama":
        raise ConfigError(
            f"model_type is {kind!r}",
            file=file,
            key="model_type",
            fix="this engine has the Llama architecture only",
        )
    for key in ("attention_bias", "mlp_bias"):
        if said.get(key):
            raise ConfigError("biases are not supported", file=file, key=key)
    if said.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{said['hidden_act']!r} is not supported", file=file, key="hidden_act")
    heads, hidden = values.int("num_attention_heads"), values.int("hidden_size")
    return ModelConfig(
        vocab_size=values.int("vocab_size"),
        hidden=hidden,
        intermediate=values.int("intermediate_size"),
        num_layers=values.int("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=values.int("num_key_value_heads", heads),
        head_dim=values.int("head_dim", hidden // max(1, heads)),
        max_tokens=values.int("max_position_embeddings", 2048),
        rms_eps=values.number("rms_norm_eps", 1e-6),
        tied=bool(said.get("tie_word_embeddings", False)),
        rope=_rope(said, file),
        eos=_eos(said.get("eos_token_id"), values.int("vocab_size"), file),
    )


def _rope(said: Mapping[str, object], file: str | None) -> Rope:
    given = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{given!r} is no object", file=file, key="rope_parameters")
    values = _Values({**said, **given}, file)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"{kind!r} is not supported", file=file, key="rope_type")
    theta = values.number("rope_theta", 10_000.0)
    if kind == "default":
        return Rope("default", theta)
    if kind == "linear":
        return Rope("linear", theta, values.number("factor"))
    return Rope(
        "llama3",
        theta,
        values.number("factor"),
        values.number("low_freq_factor"),
        values.number("high_freq_factor"),
        values.int("original_max_position_embeddings"),
    )


def _eos(given: object, vocab_size: int, file: str | None) -> frozenset[int]:
    found = given if isinstance(given, list) else [given]
    tokens = frozenset(token for token in found if type(token) is int)
    if any(not 0 <= token < vocab_size for token in tokens):
        problem = f"{given!r} is outside the {vocab_size} tokens of the model"
        raise ConfigError(problem, file=file, key="eos_token_id")
    return tokens


class _Values:
    """Reads positive numbers."""

    def __init__(self, said: Mapping[str, object], file: str | None) -> None:
        self._said, self._file = said, file

    def int(self, key: str, default: int | None = None) -> int:
        value = self._said.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise ConfigError(f"{value!r} is no positive integer", file=self._file, key=key)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._said.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{value!r} is no positive number", file=self._file, key=key)
        return float(value)
