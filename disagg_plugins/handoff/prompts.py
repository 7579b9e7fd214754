"""Which prompt a handoff holds, so that KV is never taken for another prompt of the same length."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

DIGEST_CHARS = 32


def prompt_digest(token_ids: Sequence[int], parts: Iterable[str] = ()) -> str:
    """Return 32 hexadecimal digits that change with any token and any part.

    Both sides compute it from their own reading of the request: a different tokenizer, chat
    template or request gives another digest.

    Args:
        token_ids: The prompt's token ids, each below 2**31.
        parts: What else the prompt's KV depends on, in order: digests of images, for example.
    """
    digest = hashlib.sha256(array("i", token_ids).tobytes())
    for part in parts:
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:DIGEST_CHARS]
