"""What engines say of their cached blocks: vLLM's and SGLang's messages, read (sans-IO).

Both publish over ZeroMQ, in three frames: topic, sequence number, batch. A batch is a MessagePack
array ``[time, events, ...]``; an event is a map whose ``type`` names it, or in older releases an
array that starts with the name (vLLM ``distributed/kv_events.py`` 0.32, SGLang
``disaggregation/kv_events.py`` 0.5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.scheduling.kv_blocks import (
    AllCleared,
    BlockEvent,
    BlockHash,
    BlocksRemoved,
    BlocksStored,
)

_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
_REMOVED = ("block_hashes", "medium")
_FIELDS = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}
"""Fields of the older form, in their order; what follows them is not needed."""

_SPECIAL = ("lora_id", "lora_name", "cache_salt")
"""Fields that tell of KV that depends on more than its tokens."""

MAX_HASH_BYTES = 128
"""Of a block's name, kept as long as the block: engines use 8 bytes or a digest's 32, in
hexadecimal 64."""

_decode = msgspec.msgpack.Decoder().decode


def read_message(frames: Sequence[bytes]) -> tuple[int, list[BlockEvent]]:
    """Return the sequence number and the events of one message.

    Raises:
        RemoteProtocolError: It is none that an engine sends.
    """
    if len(frames) != 3 or len(frames[1]) != 8:
        raise RemoteProtocolError(f"a message of {len(frames)} frames is no batch of KV events")
    try:
        batch: object = _decode(frames[2])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"a batch of KV events cannot be decoded: {exc}") from exc
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise RemoteProtocolError("a batch of KV events must be an array of time and events")
    return int.from_bytes(frames[1], "big"), [_event(event) for event in batch[1]]


def _event(event: object) -> BlockEvent:
    name, fields = _named(event)
    if name == "AllBlocksCleared":
        return AllCleared()
    hashes = _hashes(_list(fields, "block_hashes"))
    medium = _text(fields, "medium")
    group = _number(fields, "group_idx") if fields.get("group_idx") is not None else 0
    if name == "BlockRemoved":
        return BlocksRemoved(hashes, medium, group)
    parent = fields.get("parent_block_hash")
    token_ids = _list(fields, "token_ids")
    if set(map(type, token_ids)) - {int}:
        raise RemoteProtocolError("token_ids of a KV event must be numbers")
    keys = fields.get("extra_keys")
    special = any(fields.get(key) is not None for key in _SPECIAL) or (
        keys is not None and (not isinstance(keys, list) or any(k is not None for k in keys))
    )
    return BlocksStored(
        hashes,
        None if parent is None else _hash(parent),
        token_ids,
        _number(fields, "block_size"),
        special,
        medium,
        group,
        _text(fields, "kv_cache_spec_kind"),
    )


def _named(event: object) -> tuple[str, Mapping[str, object]]:
    """Return the name and the fields of an event of either form."""
    if isinstance(event, dict):
        name: object = event.get("type")
    elif isinstance(event, list) and event:
        name = event[0]
    else:
        raise RemoteProtocolError("a KV event must be a map or an array")
    if not isinstance(name, str):
        # not shown: lists inside lists can be deeper than can be written
        raise RemoteProtocolError(f"the name of a KV event is a {type(name).__name__}")
    if name not in _FIELDS:
        raise RemoteProtocolError(f"there is no KV event {name[:50]!r}")
    if isinstance(event, dict):
        return name, event
    return name, dict(zip(_FIELDS[name], event[1:], strict=False))


def _hashes(values: list[int]) -> Sequence[BlockHash]:
    """Return the names of blocks as they are; a look at each is for those that are not numbers."""
    if set(map(type, values)) == {int}:
        return values
    return [_hash(value) for value in values]


def _hash(value: object) -> BlockHash:
    if not isinstance(value, int | bytes | str):
        raise RemoteProtocolError(f"a block's hash is a {type(value).__name__}")
    if not isinstance(value, int) and len(value) > MAX_HASH_BYTES:
        raise RemoteProtocolError(f"a block's hash has more than {MAX_HASH_BYTES} bytes")
    return value


def _list(fields: Mapping[str, object], key: str) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise RemoteProtocolError(f"{key} of a KV event must be an array")
    return value


def _number(fields: Mapping[str, object], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int or value < 0:
        raise RemoteProtocolError(f"{key} of a KV event must be a count")
    return value


def _text(fields: Mapping[str, object], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise RemoteProtocolError(f"{key} of a KV event must be text")
    return value
