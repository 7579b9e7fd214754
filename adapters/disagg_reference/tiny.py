"""A model that is made, not downloaded: a Llama of random weights and a tokenizer of bytes.

It is an ordinary folder in Hugging Face's form, so whatever reads models reads it. What it says
makes no sense; the same seed always says the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

BYTES = 256
EOS = BYTES
VOCAB = BYTES + 1


@dataclass(frozen=True, slots=True)
class TinyShape:
    """How large it is."""

    hidden: int = 64
    intermediate: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    max_tokens: int = 4096
    seed: int = 1


def make_tiny(folder: Path, shape: TinyShape | None = None) -> Path:
    """Make the folder, at once or not at all; one that is there already stays as it is.

    Returns:
        The folder.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(made, shape or TinyShape())
        made.chmod(0o755)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(folder: Path, shape: TinyShape) -> None:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(shape.seed)

    def weight(*size: int) -> torch.Tensor:
        # wide enough that the best token leads clearly, whatever the order of additions
        return torch.randn(*size, generator=draw) * (1.5 / size[-1] ** 0.5)

    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, shape.hidden, generator=draw),
        "model.norm.weight": torch.ones(shape.hidden),
        "lm_head.weight": weight(VOCAB, shape.hidden),
    }
    for layer in range(shape.num_layers):
        base = f"model.layers.{layer}"
        tensors |= {
            f"{base}.self_attn.q_proj.weight": weight(queries, shape.hidden),
            f"{base}.self_attn.k_proj.weight": weight(keys, shape.hidden),
            f"{base}.self_attn.v_proj.weight": weight(keys, shape.hidden),
            f"{base}.self_attn.o_proj.weight": weight(shape.hidden, queries),
            f"{base}.mlp.gate_proj.weight": weight(shape.intermediate, shape.hidden),
            f"{base}.mlp.up_proj.weight": weight(shape.intermediate, shape.hidden),
            f"{base}.mlp.down_proj.weight": weight(shape.hidden, shape.intermediate),
            f"{base}.input_layernorm.weight": torch.ones(shape.hidden),
            f"{base}.post_attention_layernorm.weight": torch.ones(shape.hidden),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1))
    _tokenizer(folder)


def _config(shape: TinyShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(os.fspath(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|end|>",
                "model_max_length": TinyShape().max_tokens,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
