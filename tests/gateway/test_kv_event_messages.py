"""The messages of vLLM and SGLang, built as they build them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.kv_event_messages import read_message
from disagg_plugins.scheduling.kv_blocks import AllCleared, BlocksRemoved, BlocksStored


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class MapEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """vLLM 0.32 and SGLang 0.5.23."""


class BlockStored(MapEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    cache_salt: str | None = None


class BlockRemoved(MapEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(MapEvent):
    pass


class ArrayEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """Releases before."""


class OldStored(ArrayEvent, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class OldRemoved(ArrayEvent, tag="BlockRemoved"):
    block_hashes: list[int]


def message(number, *events):
    payload = msgspec.msgpack.encode(EventBatch(1.0, list(events), 0))
    return [b"", number.to_bytes(8, "big"), payload]


def stored(**change):
    fields = {
        "block_hashes": [b"a", 2],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return BlockStored(**{**fields, **change})


STORED = BlocksStored([b"a", 2], None, [1, 2, 3, 4], 2, medium="GPU")


def test_reads_what_engines_send():
    frames = message(7, stored(), BlockRemoved([b"a"], "GPU", group_idx=1), AllBlocksCleared())
    number, events = read_message(frames)
    assert number == 7
    assert events == [STORED, BlocksRemoved([b"a"], "GPU", 1), AllCleared()]


def test_reads_what_engines_sent_before():
    frames = message(0, OldStored([5], 4, [1, 2], 2, None, "GPU"), OldRemoved([5]))
    assert read_message(frames) == (
        0,
        [BlocksStored([5], 4, [1, 2], 2, medium="GPU"), BlocksRemoved([5])],
    )


@pytest.mark.parametrize(
    "change",
    [
        {"lora_id": 1},
        {"lora_name": "adapter"},
        {"cache_salt": "s"},
        {"extra_keys": [None, ("image", 0)]},
    ],
)
def test_kv_that_depends_on_more_than_tokens_is_special(change):
    (event,) = read_message(message(0, stored(**change)))[1]
    assert event.special


def test_extra_keys_that_are_all_empty_are_not_special():
    (event,) = read_message(message(0, stored(extra_keys=[None, None])))[1]
    assert not event.special


@pytest.mark.parametrize(
    "frames",
    [
        [b"", b"1" * 8],
        [b"", b"1", msgspec.msgpack.encode([1.0, []])],
        [b"", b"1" * 8, b"\xc1"],
        *(
            [b"", b"1" * 8, msgspec.msgpack.encode(batch)]
            for batch in (
                {},
                [1.0],
                [1.0, {}],
                [1.0, [3]],
                [1.0, [{"type": "Unknown"}]],
                [1.0, [{"type": "BlockRemoved", "block_hashes": 3}]],
                [1.0, [{"type": "BlockRemoved", "block_hashes": [[]]}]],
                [1.0, [{"type": "BlockStored", "block_hashes": [1], "token_ids": ["x"]}]],
                [1.0, [{"type": "BlockStored", "block_hashes": [1], "token_ids": [1]}]],
            )
        ),
    ],
)
def test_refuses_what_no_engine_sends(frames):
    with pytest.raises(RemoteProtocolError):
        read_message(frames)


def test_a_name_that_is_deeper_than_can_be_written_is_refused():
    for depth in range(900, 1100):
        batch = b"\x92\x00\x91\x92" + b"\x91" * depth + b"\x00\x00"
        with pytest.raises(RemoteProtocolError):
            read_message([b"", bytes(8), batch])


def test_a_hash_that_is_no_digest_is_refused():
    for name in (b"h" * 129, "h" * 129):
        with pytest.raises(RemoteProtocolError, match="more than 128 bytes"):
            read_message(message(0, stored(block_hashes=[name])))


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_reads_or_refuses_any_bytes(frames):
    try:
        read_message(frames)
    except RemoteProtocolError:
        pass
