"""Pretend tokens tell when an answer goes on from wrong ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.testing.tokens import Tokens, prompt_ids, read_ids


def written(seed: int, given_ids: list[int], count: int) -> list[int]:
    tokens = Tokens(seed, given_ids)
    return [tokens.id(i) for i in range(count)]


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 40), after=st.integers(0, 20))
def test_answer_goes_on_from_its_ids(seed: int, size: int, after: int) -> None:
    whole = written(seed, [], 24)
    read = read_ids([*prompt_ids(seed, size), *whole[:after]])
    assert read == (seed, whole[:after])
    assert written(*read, 24 - after) == whole[after:]


@given(at=st.integers(0, 9))
def test_one_wrong_id_shows_at_once(at: int) -> None:
    whole = written(5, [], 12)
    wrong = [i + (n == at) for n, i in enumerate(whole[:10])]
    assert written(5, wrong, 2) != whole[10:]


def test_one_wrong_id_of_the_prompt_shows() -> None:
    ids = prompt_ids(5, 6)
    ids[4] = 9
    read = read_ids(ids)
    assert read is not None
    assert read[0] != 5


def test_a_clients_own_ids_are_not_taken_for_ours() -> None:
    assert read_ids([1, 2, 3]) is None
    assert read_ids("text") is None
    assert read_ids([700_001 + 9, 5]) is None


def test_half_a_character_is_lost_to_who_goes_on_inside_it() -> None:
    tokens = Tokens(5, [], odd_chars=True)
    whole = [tokens.text(i) for i in range(6)]
    assert whole[1] == ""
    assert len(whole[2]) == 1
    inside = Tokens(5, [tokens.id(0), tokens.id(1)], odd_chars=True)
    assert inside.text(0) == ""
    before = Tokens(5, [tokens.id(0)], odd_chars=True)
    assert [before.text(i) for i in range(2)] == whole[1:3]
