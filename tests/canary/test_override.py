"""A tester's way to one arm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.override import MintedBy, mint_override, read_override
from disagg_plugins.errors import AuthenticationError, ConfigError, LocalProtocolError
from disagg_plugins.handoff.keys import Purpose, derive_key, sign

NOW_S = 1_790_000_000.0
MINTED = MintedBy(b"0123456789abcdef", "default")
GOOD = mint_override(MINTED, "candidate", now_s=NOW_S, valid_s=60.0)


def test_what_was_minted_is_known_until_it_ends():
    assert len(GOOD) < 100
    assert read_override(MINTED, GOOD, NOW_S + 59.0) == "candidate"
    with pytest.raises(AuthenticationError, match="has ended"):
        read_override(MINTED, GOOD, NOW_S + 60.0)


@pytest.mark.parametrize(
    "header",
    [
        GOOD.replace("candidate", "baseline"),
        GOOD.replace(" 1790000060 ", " 1790099999 "),
        GOOD[:-1] + ("0" if GOOD[-1] != "0" else "1"),
        GOOD.upper(),
        GOOD + " ",
        "",
        "candidate  ",
        "candidate 1790000060 " + "\udcff" * 64,
        "candidate 1790000060 " + "é" * 64,
        "candidate " + "9" * 13 + " " + "0" * 64,
        "x" * 100_000,
    ],
)
def test_nothing_else_is_and_none_is_repeated(header):
    with pytest.raises(AuthenticationError) as found:
        read_override(MINTED, header, NOW_S)
    assert len(header) < 10 or header[-20:] not in str(found.value)


@given(st.text(max_size=200))
def test_no_text_makes_it_fail_otherwise(header):
    with pytest.raises(AuthenticationError):
        read_override(MINTED, header, NOW_S)


def test_a_proof_made_for_another_purpose_is_worth_nothing():
    key = derive_key(b"0123456789abcdef", Purpose.ADMIN)
    proof = sign(key, b"arm", b"default", b"candidate", b"1790000060").hex()
    with pytest.raises(AuthenticationError, match="not made"):
        read_override(MINTED, f"candidate 1790000060 {proof}", NOW_S)


@pytest.mark.parametrize("valid_s", [0.0, -1.0, 31 * 86_400.0, float("nan")])
def test_none_is_good_for_ever(valid_s):
    with pytest.raises(LocalProtocolError, match="30 days"):
        mint_override(MINTED, "candidate", now_s=NOW_S, valid_s=valid_s)


def test_a_short_secret_makes_none():
    with pytest.raises(ConfigError, match="at least 16"):
        MintedBy(b"short", "default")
