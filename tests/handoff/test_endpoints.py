"""Endpoints as they arrive from strangers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.handoff.endpoints import from_json, local_host_id, to_json
from disagg_plugins.handoff.interfaces import Endpoint

GOOD = [Endpoint(rank, 2, "host", {"tcp": f"127.0.0.1:{9000 + rank}"}) for rank in range(2)]


def test_round_trip_as_values_and_as_text() -> None:
    assert from_json(to_json(GOOD)) == tuple(GOOD)
    assert from_json(json.dumps(to_json(GOOD))) == tuple(GOOD)


def test_ranks_are_put_in_order() -> None:
    assert from_json(to_json(GOOD[::-1])) == tuple(GOOD)


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [{**to_json(GOOD)[0], **fields}, to_json(GOOD)[1]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "[",
        "[" * 5000,
        "x" * 70_000,
        changed(tp_rank=1),
        changed(tp_size=3),
        changed(tp_rank="0"),
        changed(tp_rank=-1),
        changed(host_id="h" * 200),
        changed(addresses={}),
        changed(addresses={"tcp": "a" * 257}),
        changed(addresses={f"t{i}": "a" for i in range(17)}),
        changed(more=1),
        to_json(GOOD)[:1],
        to_json(GOOD) * 200,
    ],
)
def test_malformed(value: object) -> None:
    with pytest.raises(RemoteProtocolError):
        from_json(value)


def test_host_id_is_stable_and_short() -> None:
    assert local_host_id() == local_host_id()
    assert 0 < len(local_host_id()) <= 128
