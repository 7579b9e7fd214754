"""Heads as bytes: what is forwarded, and what is not."""

from __future__ import annotations

import pytest

from disagg_plugins.gateway.wire import upstream_headers


@pytest.mark.parametrize(
    "name", [b"x-disagg-arm", b"x-disagg-signature", b"x-disagg-session", b"x-disagg-explain"]
)
def test_what_is_said_to_the_gateway_does_not_reach_the_workers(name: bytes) -> None:
    lines = upstream_headers([(name, b"candidate 1 proof"), (b"x-team", b"core")], "r")
    assert name not in lines
    assert b"x-team: core\r\n" in lines
