"""Tokens of the canary's page: for one canary, one right and a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.page_token import Tokens
from disagg_plugins.errors import AuthenticationError, LocalProtocolError

SECRET = b"0123456789abcdef0123456789abcdef"
NOW_S = 1_790_000_000.0
TOKENS = Tokens(SECRET, "default")


@pytest.mark.parametrize("right", ["see", "act"])
def test_a_token_is_good_until_its_end(right) -> None:
    token = TOKENS.mint(right, NOW_S, 60.0)
    assert TOKENS.read(token, NOW_S + 59.0) == right
    with pytest.raises(AuthenticationError, match="ended"):
        TOKENS.read(token, NOW_S + 60.0)


@pytest.mark.parametrize("other", [Tokens(SECRET, "another"), Tokens(SECRET[::-1], "default")])
def test_a_token_of_another_canary_or_secret_is_not(other) -> None:
    with pytest.raises(AuthenticationError, match="not made"):
        TOKENS.read(other.mint("act", NOW_S, 60.0), NOW_S)


def test_a_right_cannot_be_raised() -> None:
    token = TOKENS.mint("see", NOW_S, 60.0)
    with pytest.raises(AuthenticationError):
        TOKENS.read("act" + token[3:], NOW_S)


@given(st.text(max_size=200))
def test_anything_else_is_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        TOKENS.read(text, NOW_S)
    assert len(text) < 4 or text not in str(caught.value)


@pytest.mark.parametrize("valid_s", [0.0, -1.0, 31 * 86_400.0])
def test_no_token_lives_for_ever(valid_s: float) -> None:
    with pytest.raises(LocalProtocolError):
        TOKENS.mint("act", NOW_S, valid_s)
