"""Which headers of a request its copy carries."""

from __future__ import annotations

import pytest

from disagg_plugins.canary.shadow_headers import ShadowHeaders
from disagg_plugins.errors import ConfigError

CLIENT = {
    "authorization": "Bearer of-the-client",
    "cookie": "a=b",
    "x-api-key": "of-the-client",
    "x-team": "core",
    "user-agent": "curl",
}


def test_nothing_is_passed_on_that_was_not_named():
    assert ShadowHeaders().of(CLIENT) == []
    assert ShadowHeaders(["X-Team"]).of(CLIENT) == [("x-team", "core")]


def test_the_clients_authorization_is_dropped_or_replaced():
    found = ShadowHeaders(["x-team"], "Bearer of-the-copies").of(CLIENT)
    assert found == [("x-team", "core"), ("authorization", "Bearer of-the-copies")]


@pytest.mark.parametrize("name", ["Authorization", "cookie", "x-api-key", "X-Auth-Token"])
def test_what_carries_secrets_can_be_on_no_list(name):
    with pytest.raises(ConfigError, match="secrets"):
        ShadowHeaders([name])


@pytest.mark.parametrize("name", ["host", "Content-Length", "x-disagg-arm", "x-request-id"])
def test_what_the_gateway_writes_itself_can_be_on_no_list(name):
    with pytest.raises(ConfigError, match="the gateway itself"):
        ShadowHeaders([name])


def test_a_value_without_end_is_left_out():
    assert ShadowHeaders(["x-team"]).of({"x-team": "x" * 4_097}) == []
