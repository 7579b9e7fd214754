"""Weights are read from one file or several, checked, and shared out between ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg_plugins.errors import ConfigError
from disagg_reference.config import read_config
from disagg_reference.weights import INDEX, SINGLE, Weights, load_weights

CPU = torch.device("cpu")


def load(folder: Path, tp_size: int = 1, dtype: str = "float32") -> Weights:
    return load_weights(folder, read_config(folder), tp_size=tp_size, dtype=dtype, device=CPU)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def test_ranks_have_all_of_it_between_them(model: Path) -> None:
    config = read_config(model)
    whole, shared = load(model), load(model, tp_size=2)
    heads, kv, dim = config.num_heads, config.num_kv_heads, config.head_dim
    for layer, (first, second) in enumerate(zip(*shared.ranks, strict=True)):
        one = whole.ranks[0][layer]
        cuts = [heads // 2 * dim, kv // 2 * dim, kv // 2 * dim]
        parts = zip(first.qkv.split(cuts), second.qkv.split(cuts), strict=True)
        assert torch.equal(one.qkv, torch.cat([torch.cat(pair) for pair in parts]))
        assert torch.equal(one.out, torch.cat([first.out, second.out], dim=1))
        assert torch.equal(one.down, torch.cat([first.down, second.down], dim=1))
        gates = zip(first.gate_up.chunk(2), second.gate_up.chunk(2), strict=True)
        assert torch.equal(one.gate_up, torch.cat([torch.cat(pair) for pair in gates]))
        assert torch.equal(one.before_mlp, second.before_mlp)


def test_several_files_are_as_good_as_one(model: Path, copy: Path) -> None:
    tensors = load_file(copy / SINGLE)
    (copy / SINGLE).unlink()
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, copy / file)
    (copy / INDEX).write_text(json.dumps({"weight_map": where}))
    ours, theirs = load(copy), load(model)
    assert torch.equal(ours.head, theirs.head)
    assert torch.equal(ours.ranks[0][1].qkv, theirs.ranks[0][1].qkv)


def test_a_tied_head_is_the_embedding(copy: Path) -> None:
    said = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    weights = load(copy)
    assert weights.head is weights.embedding


def test_they_are_converted(model: Path) -> None:
    assert load(model, dtype="bfloat16").ranks[0][0].qkv.dtype is torch.bfloat16


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / SINGLE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / SINGLE)
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_another_shape_is_refused(copy: Path) -> None:
    tensors = load_file(copy / SINGLE)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, copy / SINGLE)
    with pytest.raises(ConfigError, match=r"has the shape \(3,\), not \(64,\)"):
        load(copy)


@pytest.mark.parametrize("content", [None, b"", b"no weights at all"])
def test_a_file_that_is_none_is_named(copy: Path, content: bytes | None) -> None:
    (copy / SINGLE).unlink()
    if content is not None:
        (copy / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        load(copy)
    assert raised.value.file == str(copy / SINGLE)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "no index"),
        ("[]", "no index"),
        ("{}", "no index"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "outside its folder"),
        ('{"weight_map": {"a": 3}}', "outside its folder"),
    ],
)
def test_an_index_cannot_lead_elsewhere(copy: Path, index: str, problem: str) -> None:
    (copy / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=problem):
        load(copy)
