"""What an SGLang prefill leaves beside the KV: its first token, and all SGLang knows of it.

Travels as ``Publication.result``. Another SGLang of the same build takes the row as it is (with
the first token's log-probabilities); whoever else reads it takes the token. Imports no engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.handoff.messages import MAX_RESULT_BYTES

MAX_ROW_BYTES = MAX_RESULT_BYTES - 256
"""Leaves room for the other fields and the framing of all."""


class PrefillResult(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first token and its metadata.

    Attributes:
        first_token: The token that prefill sampled.
        cached_tokens: Prompt tokens that prefill had in its cache.
        form: Digest of the row's form (``row_form``).
        row: SGLang's metadata row of the request: its buffers' items one after another.
    """

    first_token: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    cached_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    form: Annotated[str, msgspec.Meta(max_length=32)]
    row: Annotated[bytes, msgspec.Meta(max_length=MAX_ROW_BYTES)]


def row_form(version: str, item_bytes: Sequence[int]) -> str:
    """Return 16 hexadecimal digits that change with SGLang's version and any buffer's item size."""
    text = f"{version}:{','.join(map(str, item_bytes))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pack_result(result: PrefillResult) -> bytes:
    """Return the bytes that travel.

    Raises:
        LocalProtocolError: The row is longer than a peer takes.
    """
    if len(result.row) > MAX_ROW_BYTES:
        raise LocalProtocolError(
            f"SGLang's metadata row of {len(result.row)} bytes is above {MAX_ROW_BYTES}"
        )
    return msgspec.msgpack.encode(result)


def unpack_result(data: bytes) -> PrefillResult:
    """Return what ``pack_result`` packed.

    Raises:
        RemoteProtocolError: It is malformed.
    """
    try:
        return msgspec.msgpack.decode(data, type=PrefillResult)
    except (msgspec.DecodeError, ValueError) as exc:
        raise RemoteProtocolError(f"what prefill left beside the KV is malformed: {exc}") from exc
