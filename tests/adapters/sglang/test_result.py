"""What prefill leaves beside the KV."""

from __future__ import annotations

import msgspec
import pytest

from disagg_plugins.errors import LocalProtocolError, RemoteProtocolError
from disagg_plugins.handoff.messages import MAX_RESULT_BYTES
from disagg_sglang.result import PrefillResult, pack_result, row_form, unpack_result

RESULT = PrefillResult(17, 4, row_form("0.5.23", [64, 4]), bytes(range(68)))


def test_a_result_comes_back_as_it_was() -> None:
    assert unpack_result(pack_result(RESULT)) == RESULT


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        pack_result(RESULT)[:-1],
        pack_result(RESULT) + b"\0",
        msgspec.msgpack.encode({"first_token": 1}),
        msgspec.msgpack.encode([17, 4, "form"]),
        msgspec.msgpack.encode([17, 4, "form", b"", 1]),
        msgspec.msgpack.encode([-1, 4, "form", b""]),
        msgspec.msgpack.encode([1 << 31, 4, "form", b""]),
        msgspec.msgpack.encode([17, -1, "form", b""]),
        msgspec.msgpack.encode([17, 4, "f" * 33, b""]),
        msgspec.msgpack.encode([17, 4, "form", bytes(MAX_RESULT_BYTES)]),
        b"\x91" * 5000,
    ],
)
def test_a_malformed_result_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        unpack_result(data)


def test_the_largest_row_fits() -> None:
    largest = PrefillResult(17, 4, RESULT.form, bytes(MAX_RESULT_BYTES - 256))
    assert len(pack_result(largest)) <= MAX_RESULT_BYTES
    assert unpack_result(pack_result(largest)) == largest


def test_a_row_that_no_peer_would_take_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="metadata row of 49152 bytes"):
        pack_result(PrefillResult(17, 4, RESULT.form, bytes(MAX_RESULT_BYTES)))


def test_a_form_changes_with_version_and_sizes() -> None:
    forms = {
        row_form("0.5.23", [64, 4]),
        row_form("0.5.24", [64, 4]),
        row_form("0.5.23", [4, 64]),
        row_form("0.5.23", [644]),
    }
    assert len(forms) == 4
    assert {len(form) for form in forms} == {16}
    assert row_form("0.5.23", (64, 4)) == RESULT.form
