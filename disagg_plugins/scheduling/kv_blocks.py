"""From an engine's cached blocks to pieces of prompts (pure).

Engines name the blocks that they store and remove by hashes of their own, in sizes of their own. A
block continues its parent: the tokens since the last whole piece and that piece's hash are enough
to go on, so any block size gives the same pieces as the prompt itself.

Rules:

- Nothing is claimed that the engine may not hold. A block whose parent is unknown is passed over;
  when a block goes, what was claimed behind it goes too, though the engine may still hold it.
- Blocks whose KV depends on more than tokens (an adapter, an image, a salt) are passed over.
- Only what lies in the accelerator's own memory counts, and of several groups of layers the one
  with full attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from disagg_plugins.scheduling.prefix_hashes import PIECE_BYTES, PIECE_TOKENS, token_bytes

if TYPE_CHECKING:
    from disagg_plugins.scheduling.prefix_hashes import PrefixHasher
    from disagg_plugins.scheduling.prefix_index import PrefixIndex

BlockHash = int | bytes | str
"""An engine's own name of a block; opaque."""

BlockKey = tuple[int, BlockHash]
"""Group of layers and hash: groups name blocks of equal tokens alike."""

FULL_ATTENTION = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of KV (vLLM 0.32, ``kv_cache_interface.KVCacheSpecKind``) of which every token is kept."""

OWN_MEMORY = (None, "GPU")
"""Where blocks lie; other media are slower tiers, from which an engine may or may not load."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """An engine holds these blocks now, each the parent of the next.

    Attributes:
        hashes: Their names.
        parent: The name of the block before the first, or None at a prompt's beginning.
        token_ids: Of all of them.
        block_tokens: Tokens of one block.
        special: Whether their KV depends on more than the tokens.
        medium: Where they lie.
        group: Which group of layers they belong to.
        kind: What KV that group keeps.
    """

    hashes: Sequence[BlockHash]
    parent: BlockHash | None
    token_ids: Sequence[int]
    block_tokens: int
    special: bool = False
    medium: str | None = None
    group: int = 0
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """An engine does not hold these blocks any more."""

    hashes: Sequence[BlockHash]
    medium: str | None = None
    group: int = 0


@dataclass(frozen=True, slots=True)
class AllCleared:
    """An engine holds nothing any more."""


BlockEvent = BlocksStored | BlocksRemoved | AllCleared

PART_BLOCKS = 1024
"""Blocks that are followed at a time: some 10 ms. A step of an engine stores far fewer."""


def cost(event: BlockEvent) -> int:
    """Return how much there is to do, in blocks; the tokens of large blocks count too."""
    if isinstance(event, AllCleared):
        return 1
    tokens = len(event.token_ids) if isinstance(event, BlocksStored) else 0
    return 1 + len(event.hashes) + tokens // PIECE_TOKENS


def parts(event: BlockEvent) -> Iterator[BlockEvent]:
    """Yield smaller events that say the same in the same order."""
    if isinstance(event, AllCleared) or len(event.hashes) <= PART_BLOCKS:
        yield event
        return
    size = event.block_tokens if isinstance(event, BlocksStored) else 0
    if isinstance(event, BlocksStored) and len(event.token_ids) != len(event.hashes) * size:
        yield event  # contradicts itself, and is refused as it came
        return
    for begin in range(0, len(event.hashes), PART_BLOCKS):
        end = begin + PART_BLOCKS
        part = replace(event, hashes=event.hashes[begin:end])
        if isinstance(part, BlocksStored):
            parent = event.hashes[begin - 1] if begin else part.parent
            ids = part.token_ids[begin * size : end * size]
            part = replace(part, parent=parent, token_ids=ids)
        yield part


@dataclass(slots=True)
class _Block:
    """One block of the engine: where it hangs, and what it completes.

    Attributes:
        parent: None at a prompt's beginning.
        tokens: Its last token ids, packed, as many as one piece has at most.
        last_piece: The hash at the last piece's end in or before it.
        tail_bytes: Packed length of the tokens since then.
        pieces: Hashes of the pieces that end in it.
        children: Blocks that continue it.
    """

    parent: BlockKey | None
    tokens: bytes
    last_piece: str
    tail_bytes: int
    pieces: tuple[str, ...]
    children: set[BlockKey] = field(default_factory=set)

    def says(self, other: _Block) -> bool:
        """Return whether both hang behind the same block and hold the same tokens."""
        return (self.parent, self.tokens, self.last_piece, self.tail_bytes) == (
            other.parent,
            other.tokens,
            other.last_piece,
            other.tail_bytes,
        )


class BlockTree:
    """The blocks of one worker; keeps its entries of an index true.

    Args:
        worker: The worker's name.
        index: Where its pieces are noted.
        hasher: The one that hashes prompts.
        max_blocks: Bound; blocks beyond it are passed over.

    Attributes:
        passed_over: Blocks that were stored and are not followed.
        block_tokens: Tokens of the block that was stored last: engines use whole blocks only.
    """

    def __init__(
        self, worker: str, index: PrefixIndex, hasher: PrefixHasher, max_blocks: int
    ) -> None:
        self.worker = worker
        self._index = index
        self._hasher = hasher
        self._max_blocks = max_blocks
        self._root = hasher.root("ids")
        self._blocks: dict[BlockKey, _Block] = {}
        self._uses: Counter[str] = Counter()
        self.passed_over = 0
        self.block_tokens = 1

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def full(self) -> bool:
        """Whether there is no room for more blocks."""
        return len(self._blocks) >= self._max_blocks

    def on(self, event: BlockEvent) -> None:
        """Follow one event.

        Raises:
            ValueError: It contradicts itself.
        """
        if isinstance(event, BlocksStored):
            self._stored(event)
        elif isinstance(event, AllCleared):
            self.clear()
        elif event.medium in OWN_MEMORY:
            for name in event.hashes:
                self._removed((event.group, name))

    def clear(self) -> None:
        """Claim nothing any more."""
        self._blocks.clear()
        self._uses.clear()
        self._index.forget(self.worker)

    def _stored(self, event: BlocksStored) -> None:
        if event.block_tokens < 1:
            raise ValueError("blocks of no tokens were stored")
        if len(event.token_ids) != len(event.hashes) * event.block_tokens:
            raise ValueError(
                f"{len(event.hashes)} blocks of {event.block_tokens} tokens were stored with "
                f"{len(event.token_ids)} token ids"
            )
        packed = token_bytes(event.token_ids)
        if event.special or event.medium not in OWN_MEMORY or event.kind not in FULL_ATTENTION:
            return
        parent = None if event.parent is None else (event.group, event.parent)
        if parent is not None and parent not in self._blocks:
            self.passed_over += len(event.hashes)
            return
        self.block_tokens = max(1, event.block_tokens)
        last_piece, tail = self._state(parent)
        step = event.block_tokens * (PIECE_BYTES // PIECE_TOKENS)
        for number, name in enumerate(event.hashes):
            key = (event.group, name)
            tokens = packed[number * step : (number + 1) * step]
            last_piece, tail, pieces = self._continued(last_piece, tail + tokens)
            # tokens before the last piece's end are never needed again
            block = _Block(parent, tokens[-PIECE_BYTES:], last_piece, len(tail), pieces)
            if (known := self._blocks.get(key)) is not None:
                if not known.says(block):
                    raise ValueError("a stored block was stored again as another one")
            elif not self._add(key, block):
                self.passed_over += len(event.hashes) - number
                return
            parent = key

    def _state(self, key: BlockKey | None) -> tuple[str, bytes]:
        """Return the last piece's hash at a block's end, and the packed tokens since."""
        if key is None:
            return self._root, b""
        block = self._blocks[key]
        last_piece, wanted, parts = block.last_piece, block.tail_bytes, []
        while wanted > 0:
            part = block.tokens[-wanted:]
            parts.append(part)
            wanted -= len(part)
            if wanted > 0 and block.parent is not None:
                block = self._blocks[block.parent]
        return last_piece, b"".join(reversed(parts))

    def _continued(self, last_piece: str, tail: bytes) -> tuple[str, bytes, tuple[str, ...]]:
        pieces, whole = [], len(tail) - len(tail) % PIECE_BYTES
        for begin in range(0, whole, PIECE_BYTES):
            last_piece = self._hasher.chain(last_piece, tail[begin : begin + PIECE_BYTES])
            pieces.append(last_piece)
        return last_piece, tail[whole:], tuple(pieces)

    def _add(self, key: BlockKey, block: _Block) -> bool:
        if self.full:
            return False
        for number, piece in enumerate(block.pieces):
            if not self._index.hold(self.worker, piece):
                self._release(block.pieces[:number])
                return False
            self._uses[piece] += 1
        self._blocks[key] = block
        if block.parent is not None:
            self._blocks[block.parent].children.add(key)
        return True

    def _removed(self, key: BlockKey) -> None:
        block = self._blocks.get(key)
        if block is None:
            return
        if block.parent is not None:
            self._blocks[block.parent].children.discard(key)
        leaving = [key]
        while leaving:
            gone = self._blocks.pop(leaving.pop())
            leaving.extend(gone.children)
            self._release(gone.pieces)

    def _release(self, pieces: Sequence[str]) -> None:
        for piece in pieces:
            self._uses[piece] -= 1
            if self._uses[piece] <= 0:
                del self._uses[piece]
                self._index.drop(self.worker, piece)
