"""What travels in ``bootstrap_host``, and what is refused there."""

from __future__ import annotations

import base64

import pytest

from disagg_plugins.errors import RemoteProtocolError
from disagg_sglang.room import MAX_HOST_CHARS, PREFIX, Room, pack_room, unpack_room

ENDPOINT: dict[str, object] = {
    "tp_rank": 0,
    "tp_size": 1,
    "host_id": "h",
    "addresses": {"shm": "@a"},
}


def packed(text: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(text).decode().rstrip("=")


@pytest.mark.parametrize(
    "room",
    [
        Room("t"),
        Room("ti"),
        Room("tic"),
        Room("ticket?>~", [ENDPOINT], 17),
    ],
)
def test_a_room_comes_back_as_it_was_with_and_without_a_port(room: Room) -> None:
    host = pack_room(room)
    assert unpack_room(host) == unpack_room(f"{host}:8998") == room


def test_a_host_is_letters_digits_dash_and_underscore() -> None:
    text = pack_room(Room("".join(map(chr, range(32, 127))), [ENDPOINT])).removeprefix("disagg1-")
    assert text.replace("-", "").replace("_", "").isalnum()


def test_the_largest_worker_fits() -> None:
    addresses = {"shm": "@disagg-kv-" + "0" * 32, "tcp": "[" + "2001:" * 7 + "2001]:65535"}
    ranks: list[dict[str, object]] = [
        {"tp_rank": rank, "tp_size": 256, "host_id": "h" * 47, "addresses": addresses}
        for rank in range(256)
    ]
    assert len(unpack_room(pack_room(Room("t" * 1024, ranks))).parsed_endpoints()) == 256


@pytest.mark.parametrize("host", [None, "", "None", "None:8998", "127.0.0.1", "disagg2-e30"])
def test_a_request_past_the_gateway_is_told_where_to_go(host: str | None) -> None:
    with pytest.raises(RemoteProtocolError, match="send requests to the gateway"):
        unpack_room(host)


@pytest.mark.parametrize(
    "host",
    [
        PREFIX,
        PREFIX + "a",
        PREFIX + "ä",
        PREFIX + "!!!!",
        packed(b"\xff"),
        packed(b"[]"),
        packed(b"{}"),
        packed(b'{"ticket":""}'),
        packed(b'{"ticket":"t","more":1}'),
        packed(b'{"ticket":"t","first_token":-2}'),
        packed(b'{"ticket":"t","first_token":2147483648}'),
        packed(b'{"ticket":"t","endpoints":[1]}'),
        packed(b'{"ticket":"t","endpoints":[' + b",".join([b"{}"] * 257) + b"]}"),
        packed(b'{"ticket":"' + b"t" * 1025 + b'"}'),
    ],
)
def test_a_malformed_host_is_refused(host: str) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        unpack_room(host)


def test_a_deeply_nested_host_is_malformed_too() -> None:
    depth = 5000
    nested = b'{"ticket":"t","endpoints":[{"a":' + b"[" * depth + b"]" * depth + b"}]}"
    with pytest.raises(RemoteProtocolError, match="malformed"):
        unpack_room(packed(nested))


def test_a_host_that_is_too_long_is_not_read() -> None:
    with pytest.raises(RemoteProtocolError, match=f"at most {MAX_HOST_CHARS}"):
        unpack_room(PREFIX + "A" * MAX_HOST_CHARS)


@pytest.mark.parametrize(
    "endpoints", [[], [{**ENDPOINT, "tp_size": 2}], [{**ENDPOINT, "tp_rank": 1}], [{"tp_rank": 0}]]
)
def test_endpoints_that_form_no_worker_are_refused(endpoints: list[dict[str, object]]) -> None:
    with pytest.raises(RemoteProtocolError, match="endpoints"):
        Room("t", endpoints).parsed_endpoints()
