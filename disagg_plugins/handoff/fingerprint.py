"""Which weights a worker serves, as a digest that does not depend on paths or names.

Two workers may hand KV to each other only if they computed it with the same weights. Hashing
gigabytes at every start would cost minutes, so each weight file gives its size, its header and
samples spread evenly over its length: a fine-tuned or requantised copy differs in them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
HEADER_BYTES = 1 << 16
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")

CONFIG_KEYS_IGNORED = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}
)
"""Keys of ``config.json`` that do not change what the weights compute; the dtype of the KV is a
field of its own."""


def weights_identity(model: str) -> str:
    """Return a digest of the model's configuration and weights.

    Args:
        model: A folder with ``config.json`` and weight files. Anything else, such as a hub name
            that is not on this disk, stands for itself.

    Returns:
        ``weights:`` and 24 hexadecimal digits, or ``name:`` and the name.
    """
    folder = Path(model)
    files = (
        sorted(p for p in folder.glob("*") if p.suffix in WEIGHT_SUFFIXES)
        if (folder.is_dir())
        else []
    )
    if not files:
        return f"name:{model[-200:]}"
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.is_file():
        values = json.loads(config.read_text())
        kept = {k: v for k, v in values.items() if k not in CONFIG_KEYS_IGNORED}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in files:
        digest.update(_file_sample(path))
    return f"weights:{digest.hexdigest()[:24]}"


def _file_sample(path: Path) -> bytes:
    size_bytes = path.stat().st_size
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    with path.open("rb") as file:
        digest.update(file.read(HEADER_BYTES))
        for i in range(SAMPLES_PER_FILE):
            file.seek(size_bytes * i // SAMPLES_PER_FILE)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()
