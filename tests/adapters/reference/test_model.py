"""The paged model computes what a plain one does, however its tokens are cut into pieces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_reference.config import ModelConfig, Rope, read_config
from disagg_reference.model import Llama, Piece, rope_frequencies
from disagg_reference.pool import KVPool, PoolShape
from disagg_reference.weights import load_weights

CPU = torch.device("cpu")
SIZE = 4
PROMPT = [(13 * i * i + i) % 256 for i in range(30)]
CLOSE = 1e-4
"""Between float32 and float64; the logits are of the order of ten."""


def nothing(layer: int) -> None:
    pass


def plain(folder: Path, config: ModelConfig, tokens: list[int]) -> torch.Tensor:
    """Compute the logits of all tokens in float64: no cache, one head and one token at a time."""
    named = {
        name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads

    def norm(rows: torch.Tensor, weight: str) -> torch.Tensor:
        return rows / (rows.pow(2).mean(-1, keepdim=True) + config.rms_eps).sqrt() * named[weight]

    def turn(head: torch.Tensor) -> torch.Tensor:
        found = head.clone()
        for at in range(len(head)):
            for i in range(dim // 2):
                angle = at * config.rope.theta ** (-2 * i / dim)
                a, b = head[at, i], head[at, i + dim // 2]
                found[at, i] = a * math.cos(angle) - b * math.sin(angle)
                found[at, i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
        return found

    rows = named["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_layers):
        base = f"model.layers.{layer}."
        normed = norm(rows, f"{base}input_layernorm.weight")
        q, k, v = (normed @ named[f"{base}self_attn.{p}_proj.weight"].T for p in "qkv")
        heads = []
        for head in range(config.num_heads):
            own = slice(head // group * dim, (head // group + 1) * dim)
            query, key = turn(q[:, head * dim : (head + 1) * dim]), turn(k[:, own])
            scores = query @ key.T / math.sqrt(dim)
            hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, own])
        rows = rows + torch.cat(heads, -1) @ named[f"{base}self_attn.o_proj.weight"].T
        normed = norm(rows, f"{base}post_attention_layernorm.weight")
        gate, up = (normed @ named[f"{base}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        rows = rows + (gate * gate.sigmoid() * up) @ named[f"{base}mlp.down_proj.weight"].T
    return norm(rows, "model.norm.weight") @ named["lm_head.weight"].T


@pytest.fixture(scope="module")
def config(model: Path) -> ModelConfig:
    return read_config(model)


@pytest.fixture(scope="module")
def expected(model: Path, config: ModelConfig) -> torch.Tensor:
    return plain(model, config, PROMPT).float()


def paged(model: Path, config: ModelConfig, tp_size: int = 1) -> Llama:
    local = config.num_kv_heads // tp_size
    shapes = [
        PoolShape(
            *(40, config.num_layers, config.num_kv_heads, local, config.head_dim, SIZE, "float32"),
            *(rank, tp_size),
        )
        for rank in range(tp_size)
    ]
    weights = load_weights(model, config, tp_size=tp_size, dtype="float32", device=CPU)
    return Llama(config, weights, [KVPool(shape, CPU) for shape in shapes])


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) < CLOSE


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("cuts", [(30,), (1, 30), (7, 8, 30), (4, 8, 12, 29, 30)])
def test_pieces_give_the_logits_of_the_whole(
    model: Path, config: ModelConfig, expected: torch.Tensor, cuts: tuple[int, ...], tp_size: int
) -> None:
    llama, blocks, start = paged(model, config, tp_size), [9, 3, 30, 1, 0, 39, 2, 17], 0
    for end in cuts:
        logits = llama.forward([Piece(PROMPT[:end], start, blocks, True)], nothing, nothing)
        assert logits.shape == (1, config.vocab_size)
        assert close(logits[0], expected[end - 1])
        start = end


def test_requests_of_a_batch_do_not_see_each_other(
    model: Path, config: ModelConfig, expected: torch.Tensor
) -> None:
    llama = paged(model, config)
    llama.forward([Piece(PROMPT[:20], 0, [0, 1, 2, 3, 4], False)], nothing, nothing)
    batch = [
        Piece(PROMPT[:21], 20, [0, 1, 2, 3, 4, 5], True),
        Piece(PROMPT[:9], 0, [6, 7, 8], True),
        Piece(PROMPT[3:12], 0, [9, 10, 11], False),
        Piece(PROMPT[:1], 0, [12], True),
    ]
    found = llama.forward(batch, nothing, nothing)
    assert close(found, expected[[20, 8, 0]])


def test_layers_are_announced_around_their_kv(model: Path, config: ModelConfig) -> None:
    llama, calls = paged(model, config), []
    pool = llama.pools[0]

    def before(layer: int) -> None:
        calls.append(("before", layer, bool(pool.tensor[0, layer].any())))

    def after(layer: int) -> None:
        calls.append(("after", layer, bool(pool.tensor[0, layer].any())))

    llama.forward([Piece(PROMPT[:2], 0, [0], True)], before, after)
    assert calls == [
        ("before", 0, False),
        ("after", 0, True),
        ("before", 1, False),
        ("after", 1, True),
    ]


def test_linear_scaling_divides_every_frequency() -> None:
    plain = rope_frequencies(Rope("default", 1e4), 16)
    assert plain[0] == 1.0
    assert torch.allclose(rope_frequencies(Rope("linear", 1e4, 4.0), 16), plain / 4)


def test_llama3_keeps_high_frequencies_divides_low_ones_and_blends_between() -> None:
    rope = Rope("llama3", 5e5, 8.0, 1.0, 4.0, 8192)
    plain, found = rope_frequencies(Rope("default", 5e5), 128), rope_frequencies(rope, 128)
    lengths = 2 * math.pi / plain
    high, low = lengths < 8192 / 4, lengths > 8192
    assert high.any()
    assert low.any()
    assert torch.equal(found[high], plain[high])
    assert torch.equal(found[low], plain[low] / 8)
    between = ~(high | low)
    assert between.any()
    assert bool(((found < plain) & (found > plain / 8))[between].all())
    assert bool((found.diff() < 0).all())  # no step at the ends
