"""What an engine says of its blocks becomes what the index claims: never more than is true."""

from __future__ import annotations

from dataclasses import replace
from itertools import dropwhile, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.scheduling.kv_blocks import (
    PART_BLOCKS,
    AllCleared,
    BlocksRemoved,
    BlocksStored,
    BlockTree,
    cost,
    parts,
)
from disagg_plugins.scheduling.prefix_hashes import PrefixHasher
from disagg_plugins.scheduling.prefix_index import PrefixIndex

HASHER = PrefixHasher(b"key")


class Engine:
    """An engine's prefix cache by brute force: the set of beginnings whose blocks it holds."""

    def __init__(self, block_tokens: int, max_blocks: int = 10_000) -> None:
        self.block_tokens = block_tokens
        self.held: set[tuple[int, ...]] = set()
        self.index = PrefixIndex(10_000)
        self.tree = BlockTree("w", self.index, HASHER, max_blocks)

    def name(self, beginning: tuple[int, ...]) -> int:
        return hash(beginning)

    def compute(self, prompt: tuple[int, ...]) -> None:
        size = self.block_tokens
        whole = [prompt[:end] for end in range(size, len(prompt) + 1, size)]
        # from the first missing block on all are computed, and told, again
        new = list(dropwhile(self.held.__contains__, whole))
        if not new:
            return
        parent = new[0][:-size]
        self.held.update(new)
        tokens = [t for beginning in new for t in beginning[-size:]]
        names = [self.name(b) for b in new]
        self.tree.on(BlocksStored(names, self.name(parent) if parent else None, tokens, size))

    def evict(self, beginning: tuple[int, ...]) -> None:
        self.held.discard(beginning)
        self.tree.on(BlocksRemoved([self.name(beginning)]))

    def leaves(self) -> list[tuple[int, ...]]:
        parents = {b[: -self.block_tokens] for b in self.held}
        return sorted(self.held - parents)

    def true_pieces(self, prompt: tuple[int, ...]) -> int:
        """Return how many pieces of a prompt lie in blocks that hang together from the start."""
        size, tokens = self.block_tokens, 0
        while tokens + size <= len(prompt) and prompt[: tokens + size] in self.held:
            tokens += size
        nexts = [end for end in self.held if len(end) == tokens + size]
        return max([tokens, *(_common(end, prompt) for end in nexts)]) // 64

    def claimed_pieces(self, prompt: tuple[int, ...]) -> int:
        return dict(self.index.longest(HASHER.of_ids(prompt))).get("w", 0)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


# prompts that share beginnings of every length up to 320 tokens
prompt = st.builds(
    lambda a, b, cut, n: tuple(([a] * cut + [b] * 320)[:n]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 320),
    st.integers(0, 320),
)
steps = st.lists(st.tuples(prompt, st.integers(0, 3), st.integers(0, 1000)), max_size=6)


@pytest.mark.parametrize("block_tokens", [1, 7, 16, 64, 128])
@settings(max_examples=30, deadline=None)
@given(steps, prompt)
def test_claims_what_an_engine_holds_that_gives_up_leaves_first(block_tokens, steps, asked):
    engine = Engine(block_tokens)
    for text, evictions, which in steps:
        engine.compute(text)
        for _ in range(evictions):
            if leaves := engine.leaves():
                engine.evict(leaves[which % len(leaves)])
        for each in (asked, text):
            assert engine.claimed_pieces(each) == engine.true_pieces(each)
    assert len(engine.tree) == len(engine.held)


@pytest.mark.parametrize("block_tokens", [1, 16, 64, 128])
@settings(max_examples=30, deadline=None)
@given(steps, prompt, st.integers(1, 30))
def test_never_claims_more_than_is_held_whatever_is_given_up(block_tokens, steps, asked, bound):
    engine = Engine(block_tokens, max_blocks=bound)
    for text, evictions, which in steps:
        engine.compute(text)
        for _ in range(evictions):
            if held := sorted(engine.held):
                engine.evict(held[which % len(held)])
        for each in (asked, text):
            assert engine.claimed_pieces(each) <= engine.true_pieces(each)
    assert len(engine.tree) <= bound


STORED = BlocksStored([1, 2], None, [7] * 128, 64)


@pytest.fixture
def index():
    return PrefixIndex(100)


@pytest.fixture
def tree(index):
    return BlockTree("w", index, HASHER, 100)


def test_claims_nothing_of_blocks_whose_kv_depends_on_more_than_tokens(tree, index):
    for change in ({"special": True}, {"medium": "CPU"}, {"kind": "sliding_window"}):
        tree.on(replace(STORED, **change))
        assert len(index) == len(tree) == 0


def test_passes_over_blocks_of_an_unknown_parent(tree, index):
    tree.on(replace(STORED, parent=99))
    assert (len(index), tree.passed_over) == (0, 2)


def test_a_block_that_left_a_slower_tier_stays_where_it_is(tree, index):
    tree.on(STORED)
    tree.on(BlocksRemoved([1, 2], medium="CPU"))
    assert len(index) == 2


def test_two_groups_of_layers_that_name_blocks_alike_do_not_mix(tree, index):
    tree.on(STORED)
    tree.on(replace(STORED, group=1, kind="full_attention"))
    tree.on(BlocksRemoved([1, 2], group=1))
    assert len(index) == 2


def test_clearing_claims_nothing(tree, index):
    tree.on(STORED)
    tree.on(AllCleared())
    assert len(index) == len(tree) == 0


def test_an_event_that_contradicts_itself_is_refused(tree):
    with pytest.raises(ValueError, match="2 blocks of 64 tokens were stored with 127"):
        tree.on(replace(STORED, token_ids=[7] * 127))
    with pytest.raises(ValueError, match="token id"):
        tree.on(replace(STORED, token_ids=[-1] * 128))


def test_blocks_without_tokens_are_refused(tree):
    with pytest.raises(ValueError, match="no tokens"):
        tree.on(replace(STORED, hashes=[1], token_ids=[], block_tokens=0))


def test_a_block_that_is_stored_again_with_other_tokens_is_refused(tree):
    tree.on(replace(STORED, hashes=[1], token_ids=[7] * 16, block_tokens=16))
    for other in ([7] * 30, [8] * 16):
        with pytest.raises(ValueError, match="stored again"):
            tree.on(replace(STORED, hashes=[1], token_ids=other, block_tokens=len(other)))


def test_of_a_large_block_only_the_last_tokens_are_kept(tree, index):
    ids = [n % 251 for n in range(5000)]
    tree.on(replace(STORED, hashes=[1], token_ids=ids[:4000], block_tokens=4000))
    assert sum(len(block.tokens) for block in tree._blocks.values()) <= 256
    tree.on(replace(STORED, hashes=[2], parent=1, token_ids=ids[4000:], block_tokens=1000))
    assert dict(index.longest(HASHER.of_ids(ids))) == {"w": 5000 // 64}


MANY = BlocksStored(
    range(1, 3 * PART_BLOCKS), None, [n % 251 for n in range(3, 9 * PART_BLOCKS)], 3
)


@pytest.mark.parametrize("removed", [[1], [PART_BLOCKS, 2 * PART_BLOCKS + 1], range(9, 9000)])
def test_the_parts_of_an_event_say_what_it_says(removed):
    trees = [BlockTree("w", PrefixIndex(10_000), HASHER, 10_000) for _ in range(2)]
    for event in (MANY, BlocksRemoved(removed)):
        trees[0].on(event)
        for part in parts(event):
            assert cost(part) <= 2 * PART_BLOCKS
            trees[1].on(part)
        assert trees[0]._blocks == trees[1]._blocks
        assert trees[0]._index.longest(HASHER.of_ids(MANY.token_ids)) == trees[1]._index.longest(
            HASHER.of_ids(MANY.token_ids)
        )


@pytest.mark.parametrize(
    "event", [AllCleared(), STORED, BlocksRemoved([1]), replace(MANY, token_ids=[1, 2])]
)
def test_what_is_small_or_contradicts_itself_stays_one_part(event):
    assert list(parts(event)) == [event]


def test_the_tokens_of_large_blocks_cost_as_much_as_blocks():
    assert cost(BlocksStored([1], None, [0] * 6400, 6400)) == 102
