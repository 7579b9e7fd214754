"""A model without weights whose KV can be foretold, and which checks every byte before it reads.

The KV of a token is a pure function of all tokens up to it, of the layer, of k or v, of the head
and of the place within the head. Each forward pass first looks at what attention would read, and
then at every other byte of the pools: nobody may have written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from disagg_plugins.errors import DisaggError

if TYPE_CHECKING:
    from disagg_reference.config import ModelConfig
    from disagg_reference.hosting import Batch, ConnectorHost
    from disagg_reference.model import Hook, Piece
    from disagg_reference.pool import KVPool
    from disagg_reference.request import Request

MULTIPLIER = np.uint64(6364136223846793005)


class WrongKV(DisaggError):
    """A byte of KV is not what it must be."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(rule, detail)
        self.rule = rule

    def __str__(self) -> str:
        return f"the connector broke the rule {self.rule!r}: {self.args[1]}"


def states(tokens: Sequence[int]) -> np.ndarray:
    """Return a number for each token that depends on all tokens up to it."""
    found = []
    state = 1
    for token in tokens:
        state = (state * int(MULTIPLIER) + token + 1) & (2**64 - 1)
        found.append(state)
    return np.array(found, np.uint64)


def expected(tokens: Sequence[int], layers: int, heads: range, dim: int) -> torch.Tensor:
    """Return the KV of all tokens as int32, shape ``(layers, 2, heads, tokens, dim)``."""
    with np.errstate(over="ignore"):
        place = np.arange(layers * 2 * 64 * dim, dtype=np.uint64).reshape(layers, 2, 64, 1, dim)
        mixed = (
            states(tokens)[None, None, None, :, None] ^ (place[:, :, heads] + np.uint64(7))
        ) * (MULTIPLIER)
    return torch.from_numpy((mixed >> np.uint64(33)).astype(np.int32))


class DeterministicModel:
    """See the module; in place of ``model.Llama``."""

    def __init__(self, config: ModelConfig, pools: Sequence[KVPool]) -> None:
        self._config, self._pools = config, tuple(pools)
        self._shadows = [pool.tensor.view(torch.int32).clone() for pool in pools]
        self.loading: set[int] = set()  # blocks that are being written to at any time
        self.promised: dict[int, tuple[int, int]] = {}  # first block -> tokens brought to it

    def forward(self, pieces: Sequence[Piece], before: Hook, after: Hook) -> torch.Tensor:
        """Check what is there, write what is new."""
        for layer in range(self._config.num_layers):
            before(layer)
        for rank in range(len(self._pools)):
            for piece in pieces:
                self._check(rank, piece)
            self._check_rest(rank)
            for piece in pieces:
                self._write(rank, piece)
        for layer in range(self._config.num_layers):
            after(layer)
        rows = [piece for piece in pieces if piece.sampled]
        logits = torch.zeros(len(rows), self._config.vocab_size)
        for row, piece in enumerate(rows):
            logits[row, int(states(piece.tokens)[-1] % np.uint64(250))] = 1.0
        return logits

    def _view(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        shape = self._pools[rank].shape
        return tensor.view(torch.int32).view(
            shape.num_blocks, shape.num_layers, 2, shape.num_kv_heads_local,
            shape.block_size_tokens, shape.head_dim,
        )  # fmt: skip

    def _of(self, rank: int, tensor: torch.Tensor, piece: Piece, first: int, end: int):
        """Return the KV of some tokens, shape ``(layers, 2, heads, tokens, dim)``; a copy."""
        at = torch.arange(first, end)
        size = self._pools[rank].shape.block_size_tokens
        blocks = torch.tensor(piece.blocks)[at // size]
        return self._view(rank, tensor)[blocks, :, :, :, at % size].permute(1, 2, 3, 0, 4)

    def _expected(self, rank: int, piece: Piece) -> torch.Tensor:
        layout = self._pools[rank].shape.layout
        heads = range(layout.head_start, layout.head_start + layout.num_kv_heads_local)
        return expected(piece.tokens, layout.num_layers, heads, layout.head_dim)

    def _check(self, rank: int, piece: Piece) -> None:
        if not piece.start:
            return
        found = self._of(rank, self._pools[rank].tensor, piece, 0, piece.start)
        wanted = self._expected(rank, piece)[:, :, :, : piece.start]
        wrong = (found != wanted).any(dim=-1).nonzero()
        if len(wrong):
            layer, kv, head, token = wrong[0].tolist()
            raise WrongKV(
                "KV is right",
                f"rank {rank}: {'kv'[kv]} of token {token} of {piece.start}, layer {layer}, head "
                f"{head}, and {len(wrong) - 1} more",
            )
        self._put(rank, self._shadows[rank], piece, 0, piece.start, wanted)

    def _check_rest(self, rank: int) -> None:
        found = self._pools[rank].tensor.view(torch.int32)
        if torch.equal(found, self._shadows[rank]):
            return
        differs = (found != self._shadows[rank]).flatten(1).any(dim=1).nonzero().flatten().tolist()
        foreign = [block for block in differs if block not in self.loading]
        if foreign:
            raise WrongKV(
                "nothing else is written", f"rank {rank}: block {foreign[0]} of nobody's load"
            )

    def _write(self, rank: int, piece: Piece) -> None:
        new = self._expected(rank, piece)[:, :, :, piece.start :]
        for tensor in (self._pools[rank].tensor, self._shadows[rank]):
            self._put(rank, tensor, piece, piece.start, len(piece.tokens), new)

    def _put(
        self, rank: int, tensor: torch.Tensor, piece: Piece, first: int, end: int, kv: torch.Tensor
    ) -> None:
        at = torch.arange(first, end)
        size = self._pools[rank].shape.block_size_tokens
        blocks = torch.tensor(piece.blocks)[at // size]
        self._view(rank, tensor)[blocks, :, :, :, at % size] = kv.permute(3, 0, 1, 2, 4)


class WatchedHost:
    """A host that tells the model which blocks are written to beside the forward passes."""

    def __init__(self, host: ConnectorHost, model: list[DeterministicModel]) -> None:
        self.host, self._model = host, model
        self._parking: set[int] = set()

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        matched, parks = self.host.match(request, computed_tokens)
        if parks:
            self._parking.add(request.request_id)
        return matched, parks

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        self.host.allocated(request, block_ids)
        if request.request_id in self._parking:
            self._model[0].loading.update(block_ids[request.local_tokens // _size(self._model) :])

    def begin(self, batch: Batch) -> None:
        for each in batch.scheduled:
            if each.first and each.request.request_id in self._parking:
                self._parking.discard(each.request.request_id)
                self._model[0].loading.difference_update(each.request.blocks)
        self.host.begin(batch)

    def before_layer(self, layer: int) -> None:
        self.host.before_layer(layer)

    def after_layer(self, layer: int) -> None:
        self.host.after_layer(layer)

    def end(self) -> None:
        self.host.end()

    def cancel(self, request: Request) -> None:
        self.host.cancel(request)

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        self._model[0].loading.difference_update(block_ids)
        return self.host.finished(request, block_ids)

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        return self.host.poll()

    def close(self) -> None:
        self.host.close()


def _size(model: list[DeterministicModel]) -> int:
    return model[0]._pools[0].shape.block_size_tokens
