"""Which ranks of a prefill and a decode worker exchange which KV heads.

A tensor-parallel rank holds a contiguous range of KV heads. With more ranks than heads, heads are
replicated: consecutive ranks hold the same head, and a decode rank reads one replica only.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg_plugins.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """One prefill rank that a decode rank must claim.

    Attributes:
        tp_rank: The prefill rank.
        first_head: First global KV head to read.
        end_head: End of the half-open range; equal to ``first_head`` when nothing is read and
            the claim only tells the publisher that its rows are not needed.
    """

    tp_rank: int
    first_head: int
    end_head: int


def head_range(tp_rank: int, tp_size: int, num_kv_heads: int) -> tuple[int, int]:
    """Return the half-open range of global KV heads of one rank.

    Raises:
        ConfigError: The rank does not exist or the heads do not divide among the ranks.
    """
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"tp_rank {tp_rank} is not within tp_size {tp_size}")
    if tp_size <= num_kv_heads:
        if num_kv_heads % tp_size:
            raise ConfigError(f"{num_kv_heads} KV heads do not divide among {tp_size} ranks")
        heads = num_kv_heads // tp_size
        return tp_rank * heads, (tp_rank + 1) * heads
    if tp_size % num_kv_heads:
        raise ConfigError(f"{tp_size} ranks do not divide among {num_kv_heads} KV heads")
    head = tp_rank // (tp_size // num_kv_heads)
    return head, head + 1


def sources_of(
    decode_rank: int, *, decode_size: int, prefill_size: int, num_kv_heads: int
) -> tuple[Source, ...]:
    """Return the prefill ranks that ``decode_rank`` claims, in order of rank.

    Among replicas the decode rank picks by its own number, so that replicas share the load.
    Replicas that no decode rank reads are claimed by decode rank 0 with an empty head range:
    their publisher learns that it may free its rows without waiting for the lease.
    """
    start, end = head_range(decode_rank, decode_size, num_kv_heads)
    sources = []
    for rank in range(prefill_size):
        first, last = head_range(rank, prefill_size, num_kv_heads)
        overlap = (max(first, start), min(last, end))
        if overlap[0] < overlap[1] and _picks(decode_rank, rank, prefill_size, num_kv_heads):
            sources.append(Source(rank, *overlap))
        elif decode_rank == 0 and not _readers(rank, prefill_size, decode_size, num_kv_heads):
            sources.append(Source(rank, first, first))
    return tuple(sources)


def readers_of(
    prefill_rank: int, *, prefill_size: int, decode_size: int, num_kv_heads: int
) -> frozenset[int]:
    """Return the decode ranks that must end a handoff of ``prefill_rank``; never empty."""
    readers = _readers(prefill_rank, prefill_size, decode_size, num_kv_heads)
    return readers or frozenset({0})


def _readers(
    prefill_rank: int, prefill_size: int, decode_size: int, num_kv_heads: int
) -> frozenset[int]:
    start, end = head_range(prefill_rank, prefill_size, num_kv_heads)
    readers = set()
    for rank in range(decode_size):
        first, last = head_range(rank, decode_size, num_kv_heads)
        if first < end and start < last and _picks(rank, prefill_rank, prefill_size, num_kv_heads):
            readers.add(rank)
    return frozenset(readers)


def _picks(decode_rank: int, prefill_rank: int, prefill_size: int, num_kv_heads: int) -> bool:
    replicas = max(1, prefill_size // num_kv_heads)
    return prefill_rank % replicas == decode_rank % replicas
