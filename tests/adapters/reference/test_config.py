"""What is read of ``config.json``, and what is refused rather than computed wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_reference.config import MAX_CONFIG_BYTES, Rope, config_of, raw_config, read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 257,
}


def test_what_is_left_out_has_hugging_faces_default() -> None:
    config = config_of(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.max_tokens) == (4, 16, 2048)
    assert (config.rms_eps, config.tied, config.eos) == (1e-6, False, frozenset())
    assert config.rope == Rope("default", 10_000.0)


@pytest.mark.parametrize(
    ("said", "rope"),
    [
        ({"rope_theta": 5e5}, Rope("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope("default", 5e5)),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
            Rope("default", 1e5),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope("linear", 1e4, 4.0)),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 4096,
                },
            },
            Rope("llama3", 5e5, 32.0, 1.0, 4.0, 4096),
        ),
    ],
)
def test_rotary_settings_are_read_in_the_old_form_and_the_new(
    said: dict[str, Any], rope: Rope
) -> None:
    assert config_of({**LLAMA, **said}).rope == rope


@pytest.mark.parametrize(("said", "eos"), [(2, {2}), ([2, 5], {2, 5}), (None, set())])
def test_one_token_may_end_an_answer_or_several(said: object, eos: set[int]) -> None:
    assert config_of({**LLAMA, "eos_token_id": said}).eos == eos


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no positive number"),
        ({"rope_scaling": [1]}, "is no object"),
        ({"vocab_size": None}, "no positive integer"),
        ({"vocab_size": True}, "no positive integer"),
        ({"num_hidden_layers": 0}, "no positive integer"),
        ({"rms_norm_eps": float("nan")}, "no positive number"),
    ],
)
def test_another_model_is_refused(said: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of({**LLAMA, **said})


def test_ranks_must_divide_heads_and_mlp() -> None:
    config = config_of(LLAMA)
    config.check_tp(2)
    for size in (0, 3, 8):
        with pytest.raises(ConfigError, match="cannot be shared"):
            config.check_tp(size)
    with pytest.raises(ConfigError, match="MLP of 129"):
        config_of({**LLAMA, "intermediate_size": 129}).check_tp(2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        (" " * (MAX_CONFIG_BYTES + 1), "more than 1 MiB"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=problem) as raised:
        read_config(tmp_path)
    assert raised.value.file == str(tmp_path / "config.json")


def test_all_of_it_is_there_as_attributes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "unknown": 3}))
    assert raw_config(tmp_path).unknown == 3


def test_an_end_token_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="outside the"):
        config_of({**LLAMA, "eos_token_id": 1 << 40})
