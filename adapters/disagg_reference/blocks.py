"""Which KV blocks are whose, and what they hold (pure).

Blocks are shared by reference count. A full block whose KV was computed is remembered under the
hash of all tokens up to its end; when nobody uses it any more it goes to the end of the free list,
and is found again until it is needed for something else (vLLM's prefix cache works the same way).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

NO_HASH = b""


def chained(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a block whose predecessor has the hash ``parent``."""
    data = parent + b"".join(token.to_bytes(8, "big") for token in tokens)
    return hashlib.blake2b(data, digest_size=16).digest()


class Blocks:
    """The blocks of one engine; all its ranks use the same numbers.

    Args:
        count: Blocks.
        size_tokens: Tokens of one block.
    """

    def __init__(self, count: int, size_tokens: int) -> None:
        self.count, self.size_tokens = count, size_tokens
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(count))
        self._uses = [0] * count
        self._hash = [NO_HASH] * count
        self._by_hash: dict[bytes, int] = {}
        self._promised = 0

    @property
    def free(self) -> int:
        """Blocks that nobody uses and nobody was promised."""
        return len(self._free) - self._promised

    @property
    def used(self) -> int:
        """Blocks in use."""
        return self.count - len(self._free)

    def needed(self, num_tokens: int) -> int:
        """Return the blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.size_tokens)

    def cached(self, prompt: Sequence[int]) -> list[int]:
        """Return the blocks that hold the beginning of a prompt, never all of it.

        The last token is always computed: its output is what the answer begins with.
        """
        found: list[int] = []
        parent = NO_HASH
        for start in range(0, len(prompt) - 1, self.size_tokens):
            end = start + self.size_tokens
            if end >= len(prompt):
                break
            parent = chained(parent, prompt[start:end])
            block = self._by_hash.get(parent)
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, cached: Sequence[int], needed: int) -> bool:
        """Take ``cached`` and promise the rest of ``needed``; False, and nothing, if it is short.

        Args:
            cached: As ``cached`` found them.
            needed: Blocks that the request may need in all.
        """
        idle = sum(1 for block in cached if not self._uses[block])
        if self.free < needed - len(cached) + idle:
            return False
        for block in cached:
            if not self._uses[block]:
                del self._free[block]
            self._uses[block] += 1
        self._promised += needed - len(cached)
        return True

    def take(self, count: int) -> list[int]:
        """Return ``count`` of the blocks that were promised."""
        if not 0 <= count <= self._promised:
            raise ValueError(f"{count} blocks of {self._promised} promised ones")
        self._promised -= count
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._uses[block] = 1
            taken.append(block)
        return taken

    def give_back(self, blocks: Sequence[int], promised: int) -> None:
        """Stop using ``blocks``, and the promise of ``promised`` more.

        The ends of prompts go first: a beginning is of use to more requests.
        """
        self._promised -= promised
        for block in reversed(blocks):
            self._uses[block] -= 1
            if not self._uses[block]:
                self._free[block] = None
                if self._hash[block] == NO_HASH:
                    self._free.move_to_end(block, last=False)

    def computed(self, tokens: Sequence[int], blocks: Sequence[int], first: int, end: int) -> None:
        """Remember the full blocks among tokens ``[first, end)``, whose KV is there now."""
        size = self.size_tokens
        if first // size == end // size:
            return
        parent = NO_HASH if first < size else self._hash[blocks[first // size - 1]]
        if first >= size and parent == NO_HASH:
            return  # its predecessor was not remembered: another request computed the same
        for index in range(first // size, end // size):
            parent = chained(parent, tokens[index * size : (index + 1) * size])
            block = blocks[index]
            if self._hash[block] == parent:
                continue
            if parent not in self._by_hash:
                self._by_hash[parent] = block
            self._hash[block] = parent

    def _forget(self, block: int) -> None:
        known, self._hash[block] = self._hash[block], NO_HASH
        if known != NO_HASH and self._by_hash.get(known) == block:
            del self._by_hash[known]
