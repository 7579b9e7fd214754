"""Hashes of the beginnings of prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.scheduling.prefix_hashes import MAX_PIECES, PrefixHasher

HASHER = PrefixHasher(b"key")
ids = st.lists(st.integers(0, 9), max_size=200)


@given(ids, ids, ids)
def test_equal_hashes_are_equal_beginnings_and_nothing_else(common, one, other):
    first, second = common + one, common + other
    same = 0
    while same < min(len(first), len(second)) // 64 and (
        first[: 64 * (same + 1)] == second[: 64 * (same + 1)]
    ):
        same += 1
    hashes = HASHER.of_ids(first), HASHER.of_ids(second)
    assert [len(h) for h in hashes] == [len(first) // 64, len(second) // 64]
    assert [a == b for a, b in zip(*hashes, strict=False)] == [
        n < same for n in range(min(map(len, hashes)))
    ]


def test_a_piece_of_text_is_the_same_whatever_follows_it():
    assert HASHER.of_text("a" * 10 + "é" * 10, 10)[:1] == HASHER.of_text("a" * 13, 10)


def test_text_and_ids_other_salts_and_other_keys_never_agree():
    prompts = [
        HASHER.of_ids([97] * 64),
        HASHER.of_ids([97] * 64, "adapter"),
        HASHER.of_text("a" * 64, 64),
        HASHER.of_text("a" * 256, 256),
        PrefixHasher(b"another").of_ids([97] * 64),
    ]
    assert len({hashes[0] for hashes in prompts}) == len(prompts)


def test_ids_that_no_vocabulary_has_give_no_hashes():
    for wrong in (-1, 1 << 32, 1 << 80):
        assert HASHER.of_ids([wrong] * 64) == ()


def test_lone_surrogates_are_hashed_too():
    assert len(HASHER.of_text("\ud800" * 64, 64)) == 1


def test_only_the_beginning_of_an_endless_prompt_is_hashed():
    assert len(HASHER.of_text("a" * (MAX_PIECES + 5) * 2, 2)) == MAX_PIECES
