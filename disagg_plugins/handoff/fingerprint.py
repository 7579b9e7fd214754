"""Which weights a worker serves, as a digest that does not depend on paths or names.

Two workers may hand KV to each other only if they computed it with the same weights. Hashing
hundreds of gigabytes at every start would cost minutes, so small files are hashed whole, and large
ones by their header and samples: of a safetensors file, pieces of every tensor, so that an edit of
any layer shows; of other files, pieces spread evenly. An edit that changes single elements of a
large tensor and spares every sample is not seen: give such weights another revision or name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

WHOLE_BYTES = 1 << 28
"""Files up to 256 MiB are hashed whole: about 0.2 s."""

SAMPLES_PER_FILE = 4096
SAMPLES_PER_TENSOR = 4
SAMPLE_BYTES = 4096
MAX_HEADER_BYTES = 100 << 20
"""The safetensors format's own bound on its header."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")

CONFIG_KEYS_IGNORED = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
)
"""Keys of ``config.json`` that do not change what the weights compute; the dtype of the KV is a
field of its own."""


TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
TOKENIZER_KEYS_IGNORED = frozenset({"chat_template", "name_or_path", "transformers_version"})
"""Keys of ``tokenizer_config.json`` that do not change token ids; the template is told apart."""


def weights_identity(model: str) -> str:
    """Return a digest of the model's configuration and weights.

    Args:
        model: A folder with ``config.json`` and weight files, or one weight file. Anything else,
            such as a hub name that is not on this disk, stands for itself.

    Returns:
        ``weights:`` and 24 hexadecimal digits, or ``name:`` and the name.
    """
    path = Path(model)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.glob("*") if p.suffix in WEIGHT_SUFFIXES)
    else:
        files = []
    if not files:
        return f"name:{model[-200:]}"
    digest = hashlib.sha256()
    config = path / "config.json"
    if config.is_file():
        values = json.loads(config.read_text())
        kept = {k: v for k, v in values.items() if k not in CONFIG_KEYS_IGNORED}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    for each in files:
        digest.update(_file_digest(each))
    return f"weights:{digest.hexdigest()[:24]}"


def tokenizer_identity(tokenizer: str) -> str:
    """Return a digest of what turns text into token ids.

    Args:
        tokenizer: A folder with tokenizer files; anything else stands for itself.
    """
    folder = Path(tokenizer)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return f"name:{tokenizer[-200:]}"
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        if path.name == TOKENIZER_CONFIG:
            kept = {k: v for k, v in json.loads(data).items() if k not in TOKENIZER_KEYS_IGNORED}
            data = json.dumps(kept, sort_keys=True).encode()
        digest.update(f"{path.name}:{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def chat_template_identity(tokenizer: str, override: str | None = None) -> str:
    """Return a digest of the template that turns chat messages into text; ``none`` without one.

    Args:
        tokenizer: The tokenizer's folder.
        override: What the engine was given instead: a file, or the template or its name itself.
    """
    if override:
        path = Path(override)
        with contextlib.suppress(OSError):
            override = path.read_text() if path.is_file() else override
        return hashlib.sha256(override.encode()).hexdigest()[:16]
    separate, config = Path(tokenizer) / "chat_template.jinja", Path(tokenizer) / TOKENIZER_CONFIG
    template: object = None
    if separate.is_file():
        template = separate.read_text()
    elif config.is_file():
        template = json.loads(config.read_text()).get("chat_template")
    if not template:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_folder(model: str, revision: str | None = None) -> str:
    """Return the folder or file that holds the weights, else the model's name and revision."""
    if Path(model).exists():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return f"{model}@{revision or 'main'}"


def rope_settings(config: object) -> str:
    """Return a model's rotary settings as canonical JSON, or ``none``.

    Args:
        config: The text part of its Hugging Face configuration.
    """
    values = {
        name: getattr(config, name)
        for name in ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
        if getattr(config, name, None) is not None
    }
    # Newer transformers keep theta inside rope_parameters and answer both; keep one spelling.
    parameters = values.pop("rope_parameters", None)
    if isinstance(parameters, dict):
        values = {**values, **parameters}
    if isinstance(scaling := values.pop("rope_scaling", None), dict):
        values.update(scaling)
    # The kind has an older name, which SGLang writes beside the newer one.
    if (kind := values.pop("type", None)) is not None:
        values.setdefault("rope_type", kind)
    if values.get("rope_type") == "default":
        del values["rope_type"]
    return json.dumps(values, sort_keys=True, default=str) if values else "none"


def _file_digest(path: Path) -> bytes:
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size_bytes <= WHOLE_BYTES:
            while piece := file.read(1 << 20):
                digest.update(piece)
            return digest.digest()
        for start_byte, end_byte in _samples(path, file, size_bytes):
            file.seek(start_byte)
            digest.update(file.read(end_byte - start_byte))
    return digest.digest()


def _samples(path: Path, file: BinaryIO, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield half-open byte ranges to hash: the header and pieces of every tensor."""
    if path.suffix == ".safetensors":
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
            data_at = 8 + header_bytes
            header = json.loads(file.read(header_bytes))
            yield 0, data_at
            for name in sorted(header):
                if name != "__metadata__":
                    start, end = header[name]["data_offsets"]
                    yield from _spread(data_at + start, data_at + end, SAMPLES_PER_TENSOR)
            return
    yield from _spread(0, size_bytes, SAMPLES_PER_FILE)


def _spread(start_byte: int, end_byte: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield ``count`` ranges spread evenly, the first at the start and the last at the end."""
    span = max(0, end_byte - start_byte - SAMPLE_BYTES)
    for i in range(count):
        at = start_byte + span * i // max(1, count - 1)
        yield at, min(end_byte, at + SAMPLE_BYTES)
