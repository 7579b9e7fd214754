from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.engines import model

FIELDS = {
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.rope.dimension_count": 64,
    "llama.context_length": 8192,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}


def test_rope_permutation_is_undone() -> None:
    num_heads, head_dim, hidden = 3, 8, 5
    plain = np.arange(num_heads * head_dim * hidden).reshape(num_heads * head_dim, hidden)
    # llama.cpp puts element i of a head's first half beside element i of its second half.
    pairs = plain.reshape(num_heads, 2, head_dim // 2, hidden).swapaxes(1, 2)
    permuted = pairs.reshape(num_heads * head_dim, hidden)
    assert (model.undo_rope_permutation(permuted, num_heads) == plain).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", ("model.embed_tokens.weight", None)),
        ("blk.12.attn_q.weight", ("model.layers.12.self_attn.q_proj.weight", 12)),
        ("blk.0.ffn_norm.weight", ("model.layers.0.post_attention_layernorm.weight", 0)),
    ],
)
def test_tensors_are_renamed(name: str, expected: tuple[str, int | None]) -> None:
    assert model.hf_name(name) == expected


def test_padded_heads_keep_the_group_size() -> None:
    config = model.make_config(FIELDS, num_layers=4, num_kv_heads=4)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (12, 4)
    assert config["head_dim"] == 64
    assert config["num_hidden_layers"] == 4
    assert config["rms_norm_eps"] == 1e-05
    assert config["rope_theta"] == 100000.0


def test_padding_appends_zeros() -> None:
    padded = model.pad_heads(np.ones((2, 3)), 1, 2)
    assert padded.shape == (2, 5)
    assert padded.sum() == 6


def test_folder_that_is_ready_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"version": model.RECIPE_VERSION, "layers": 4, "kv_heads": None}
    (tmp_path / "conversion.json").write_text(json.dumps(recipe))
    assert model.main([str(tmp_path), "--layers", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path} is ready\n"


def test_missing_wheel_is_told_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "SOURCE_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="run `make model`"):
        model.main([str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
