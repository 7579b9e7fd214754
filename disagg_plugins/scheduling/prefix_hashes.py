"""Names for the beginnings of prompts: one chained hash for each whole piece.

A piece is 64 tokens, or so many characters as 64 tokens have on average where the tokens are not
known. Each hash covers its piece and everything before it, so equal hashes mean equal beginnings.
Hashes of tokens and of text are never equal.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

PIECE_TOKENS = 64
"""Engines cache blocks of 1 to 128 tokens; finer pieces cost more and hardly decide otherwise."""

MAX_PIECES = 4096
"""Of one prompt: 262,144 tokens. What follows is not told apart."""

MAX_TOKEN_ID = (1 << 32) - 1
"""Vocabularies have less than a million tokens; engines refuse what they do not know."""

PIECE_BYTES = PIECE_TOKENS * array("I").itemsize
"""Of the ids of one piece, as they are hashed."""


class PrefixHasher:
    """Hashes prompts; two hashers with unlike keys never agree.

    Args:
        key: Up to 64 random bytes, so that no client can look for prompts whose hashes are equal.
    """

    def __init__(self, key: bytes) -> None:
        self._piece = hashlib.blake2b(digest_size=8, key=key)

    def root(self, kind: str, salt: str = "") -> str:
        """Return the hash of nothing, from which a chain starts."""
        return self.chain("", f"{kind}\0{salt}".encode("utf-8", "surrogatepass"))

    def chain(self, before: str, piece: bytes | memoryview) -> str:
        """Return the hash of ``piece`` behind what ``before`` is the hash of."""
        state = self._piece.copy()
        state.update(before.encode("ascii"))
        state.update(piece)
        return state.hexdigest()

    def of_ids(self, ids: Sequence[int], salt: str = "") -> tuple[str, ...]:
        """Return a hash for each whole piece of a prompt given as token ids, longest last.

        Args:
            ids: The prompt; ids that no vocabulary has give no hashes at all.
            salt: What else tells KV of equal tokens apart: an adapter's name, a cache's salt.
        """
        try:
            packed = token_bytes(ids[: MAX_PIECES * PIECE_TOKENS])
        except ValueError:
            return ()
        view, chain, before = memoryview(packed), self.chain, self.root("ids", salt)
        hashes = []
        for start in range(0, len(packed) - PIECE_BYTES + 1, PIECE_BYTES):
            before = chain(before, view[start : start + PIECE_BYTES])
            hashes.append(before)
        return tuple(hashes)

    def of_text(self, text: str, piece_chars: int, salt: str = "") -> tuple[str, ...]:
        """Return a hash for each whole piece of ``piece_chars`` characters, longest last."""
        chain, before = self.chain, self.root(f"text{piece_chars}", salt)
        hashes = []
        chars = min(len(text), MAX_PIECES * piece_chars)
        for start in range(0, chars - piece_chars + 1, piece_chars):
            piece = text[start : start + piece_chars].encode("utf-8", "surrogatepass")
            before = chain(before, piece)
            hashes.append(before)
        return tuple(hashes)


def token_bytes(ids: Sequence[int]) -> bytes:
    """Return token ids as they are hashed.

    Raises:
        ValueError: One of them is no token id.
    """
    try:
        return array("I", ids).tobytes()
    except (OverflowError, TypeError) as exc:
        raise ValueError(f"a token id is not a number from 0 to {MAX_TOKEN_ID}") from exc
