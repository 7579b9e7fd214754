"""Who reads what from whom, for every pair of sizes."""

from __future__ import annotations

from itertools import product

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.handoff.shards import head_range, readers_of, sources_of

SIZES = [(h, p, d) for h, p, d in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16))]


@pytest.mark.parametrize(("heads", "prefill", "decode"), SIZES)
def test_every_rank_gets_its_heads_once_and_both_sides_agree(
    heads: int, prefill: int, decode: int
) -> None:
    claims: dict[int, set[int]] = {rank: set() for rank in range(prefill)}
    for rank in range(decode):
        got: list[int] = []
        for source in sources_of(
            rank, decode_size=decode, prefill_size=prefill, num_kv_heads=heads
        ):
            claims[source.tp_rank].add(rank)
            got += range(source.first_head, source.end_head)
        assert got == list(range(*head_range(rank, decode, heads)))
    for rank, claimed in claims.items():
        assert claimed == readers_of(
            rank, prefill_size=prefill, decode_size=decode, num_kv_heads=heads
        )


@pytest.mark.parametrize(("rank", "size", "heads"), [(2, 2, 4), (-1, 2, 4), (0, 3, 4), (0, 6, 4)])
def test_impossible_shards(rank: int, size: int, heads: int) -> None:
    with pytest.raises(ConfigError):
        head_range(rank, size, heads)
