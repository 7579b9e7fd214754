"""Blocks are shared by count, found again by what they hold, and never handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_reference.blocks import NO_HASH, Blocks, chained

PROMPT = list(range(20))


def held(blocks: Blocks, tokens: list[int]) -> list[int]:
    """Admit a request for these tokens, and remember them as computed."""
    cached = blocks.cached(tokens)
    needed = blocks.needed(len(tokens))
    assert blocks.admit(cached, needed)
    found = [*cached, *blocks.take(needed - len(cached))]
    blocks.computed(tokens, found, len(cached) * blocks.size_tokens, len(tokens))
    return found


def test_a_hash_depends_on_everything_before() -> None:
    first = chained(NO_HASH, [1, 2])
    assert chained(first, [3]) != chained(NO_HASH, [3])
    assert chained(NO_HASH, [1, 2]) == first != chained(NO_HASH, [2, 1])


def test_tokens_are_rounded_up_to_blocks() -> None:
    blocks = Blocks(8, 4)
    assert [blocks.needed(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_full_blocks_are_found_again_and_the_last_token_never_is() -> None:
    blocks = Blocks(8, 4)
    found = held(blocks, PROMPT)
    assert blocks.cached(PROMPT) == found[:4]  # its fifth block ends with the last token
    assert blocks.cached([*PROMPT, 99]) == found
    assert blocks.cached([*PROMPT[:8], 99, 99]) == found[:2]
    assert blocks.cached([99, *PROMPT]) == []


def test_what_is_shared_is_free_when_the_last_user_is_gone() -> None:
    blocks = Blocks(8, 4)
    first, second = held(blocks, PROMPT), held(blocks, PROMPT)
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert blocks.used == 6
    blocks.give_back(first, 0)
    assert blocks.used == 5
    blocks.give_back(second, 0)
    assert (blocks.used, blocks.free) == (0, 8)


def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    blocks = Blocks(4, 4)
    assert blocks.admit([], 3)
    assert blocks.free == 1
    assert not blocks.admit([], 2)
    assert blocks.free == 1
    blocks.give_back(blocks.take(1), promised=2)
    assert blocks.free == 4


def test_idle_cached_blocks_count_as_room_only_once() -> None:
    blocks = Blocks(4, 4)
    blocks.give_back(held(blocks, PROMPT[:12]), 0)
    cached = blocks.cached(PROMPT[:13])
    assert len(cached) == 3
    assert not blocks.admit(cached, 5)
    assert blocks.admit(cached, 4)
    assert blocks.free == 0


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    blocks = Blocks(4, 4)
    found = held(blocks, PROMPT[:16])
    blocks.give_back(found, 0)
    assert blocks.admit([], 1)
    assert blocks.take(1) == [found[3]]
    assert blocks.cached([*PROMPT[:16], 99]) == found[:3]


def test_blocks_that_hold_nothing_are_taken_first() -> None:
    blocks = Blocks(4, 4)
    blocks.give_back(held(blocks, PROMPT[:8]), 0)
    assert blocks.admit([], 2)
    blocks.take(2)
    assert len(blocks.cached([*PROMPT[:8], 99])) == 2


def test_more_than_was_promised_is_refused() -> None:
    blocks = Blocks(4, 4)
    assert blocks.admit([], 1)
    with pytest.raises(ValueError, match="2 blocks of 1 promised"):
        blocks.take(2)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(st.lists(st.one_of(PROMPTS, st.integers(0, 5)), max_size=40))
def test_no_order_of_requests_loses_a_block_or_finds_a_wrong_one(steps: list[list[int] | int]):
    blocks = Blocks(10, 2)
    holds: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
    running: list[list[int]] = []
    for step in steps:
        if isinstance(step, int):
            if running:
                blocks.give_back(running.pop(step % len(running)), 0)
            continue
        cached = blocks.cached(step)
        for i, block in enumerate(cached):
            assert holds[block] == tuple(step[: 2 * i + 2])
        needed = blocks.needed(len(step))
        if not blocks.admit(cached, needed):
            assert blocks.free < needed
            continue
        taken = blocks.take(needed - len(cached))
        assert not {*taken} & {block for other in running for block in other}
        found = [*cached, *taken]
        for i, block in enumerate(taken, len(cached)):
            holds[block] = tuple(step[: 2 * i + 2])
        blocks.computed(step, found, 2 * len(cached), len(step))
        running.append(found)
        assert blocks.used == len({block for other in running for block in other})
    for each in running:
        blocks.give_back(each, 0)
    assert (blocks.used, blocks.free) == (0, 10)
