"""Tickets: genuine ones work, everything else is refused without being repeated."""

from __future__ import annotations

import base64
import random

import pytest

from disagg_plugins.errors import AuthenticationError, ConfigError, LocalProtocolError
from disagg_plugins.handoff.keys import Purpose, derive_key, sign
from disagg_plugins.handoff.tickets import (
    MAX_TICKET_CHARS,
    Ticket,
    mint,
    new_handoff_id,
    peek_handoff_id,
    verify,
)

SECRET = b"0123456789abcdef"
ID = "00112233445566778899aabbccddeeff"


def make(**changes: object) -> str:
    fields = {"handoff_id": ID, "prefill": "p0", "decode": "d0", "now_s": 1000.0, "valid_s": 60.0}
    return mint(SECRET, **{**fields, **changes})  # type: ignore[arg-type]


def test_round_trip() -> None:
    text = make()
    assert verify(SECRET, text, 1059.9) == Ticket(ID, "p0", "d0", 1000.0, 1060.0)
    assert len(text) < 200
    assert peek_handoff_id(text) == ID


def test_longest_names_stay_within_the_bound() -> None:
    assert len(make(prefill="ä" * 64, decode="ö" * 64)) <= MAX_TICKET_CHARS


@pytest.mark.parametrize(("now_s", "match"), [(1060.0, "expired"), (900.0, "in the future")])
def test_time(now_s: float, match: str) -> None:
    with pytest.raises(AuthenticationError, match=match):
        verify(SECRET, make(), now_s)


def test_any_changed_character_voids_it() -> None:
    text, source = make(), random.Random(1)
    for _ in range(300):
        at = source.randrange(len(text) - 1)
        other = source.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
        changed = text[:at] + other + text[at + 1 :]
        if changed != text:
            with pytest.raises(AuthenticationError) as caught:
                verify(SECRET, changed, 1001)
            assert changed not in str(caught.value)


@pytest.mark.parametrize("text", ["", "x", "ä" * 20, "=" * 8, "A" * 2000, "AAAA\n", "A" * 60])
def test_nonsense(text: str) -> None:
    with pytest.raises(AuthenticationError):
        verify(SECRET, text, 1001)
    assert peek_handoff_id(text) == "unknown"


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x95\xa1x\xa1p\xa1d\x00\x01", b"\x91" * 500])
def test_signed_nonsense(body: bytes) -> None:
    proof = sign(derive_key(SECRET, Purpose.TICKET), body)
    with pytest.raises(AuthenticationError):
        verify(SECRET, base64.urlsafe_b64encode(proof + body).decode(), 1001)


def test_a_proof_for_another_purpose_is_worthless() -> None:
    keys = {derive_key(SECRET, purpose) for purpose in Purpose}
    assert len(keys) == len(Purpose)


def test_parts_cannot_shift() -> None:
    assert sign(SECRET, b"ab", b"c") != sign(SECRET, b"a", b"bc")


def test_short_secret() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        derive_key(b"short", Purpose.TICKET)


@pytest.mark.parametrize("change", [{"handoff_id": "X" * 32}, {"prefill": "p" * 65}])
def test_malformed_fields_are_not_minted(change: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        make(**change)


def test_new_ids_are_well_formed_and_differ() -> None:
    assert len({new_handoff_id() for _ in range(100)}) == 100
    make(handoff_id=new_handoff_id())
