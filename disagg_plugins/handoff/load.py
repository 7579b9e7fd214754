"""One load: the claims that one decode rank holds, and the reading of their rows into a sink."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.errors import (
    DisaggError,
    HandoffAborted,
    HandoffTimeout,
    RemoteProtocolError,
)
from disagg_plugins.handoff.cancellation import Cancellation
from disagg_plugins.handoff.canonical import to_canonical, token_pieces
from disagg_plugins.handoff.frames import MAX_DATA_BYTES
from disagg_plugins.handoff.interfaces import DirectSink, Form, Outcome

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Channel, Offer, Place, Sink
    from disagg_plugins.handoff.layouts import KVLayout
    from disagg_plugins.handoff.shards import Source

READ_BYTES = 16 << 20
"""Aim for the bytes of one layer in one READ; bounds the receive buffer of long prompts."""

PIECE_BYTES = 512 << 10
"""Sinks get canonical KV in pieces of about this size: what they copy on the way stays in the
core's cache, and rows that were converted here are there already (4.9 GB per CPU-second for
converting and copying out, 6.5 for one plain copy; Xeon, 2 MiB of L2)."""


@dataclass(slots=True)
class Part:
    """One prefill rank's share of a load, claimed.

    Attributes:
        source: The rank and the heads to read.
        channel: Where it is claimed.
        key: Transport name and address.
        offer: What the publisher answered.
        ended: Whether the publisher has confirmed the end.
    """

    source: Source
    channel: Channel
    key: tuple[str, str]
    offer: Offer
    ended: bool = False


@dataclass(slots=True)
class Load:
    """What is asked for, and how far it has come. Used by one thread.

    Attributes:
        handoff_id: Named in errors.
        ticket: The signed text.
        layout: Of this decode rank.
        first_token: First token to load.
        end_token: End of the half-open range.
        sink: Where the bytes go.
        prompt: Digest of the prompt whose KV is wanted; empty: not compared.
        cancellation: Ends the load from another thread.
        load_s: Bound on the whole load; counted from ``started_s``.
        started_s: Monotonic time.
    """

    handoff_id: str
    ticket: str
    layout: KVLayout
    first_token: int
    end_token: int
    sink: Sink
    load_s: float
    started_s: float
    prompt: str = ""
    parts: list[Part] = field(default_factory=list)
    payload_bytes: int = 0
    form: Form = "native"
    result: bytes = b""
    cancellation: Cancellation = field(default_factory=Cancellation)

    @property
    def deadline_s(self) -> float:
        """Monotonic time at which the whole load is given up."""
        return self.started_s + self.load_s

    def add(self, part: Part) -> None:
        """Take over a claimed part, then look at what it offers.

        Raises:
            HandoffAborted: The publisher has another number of tokens, or another prompt.
            RemoteProtocolError: The rank holds other heads than its number says.
        """
        self.parts.append(part)
        offer, source = part.offer, part.source
        if offer.num_tokens < self.end_token or (
            self.prompt and offer.num_tokens != self.end_token
        ):
            raise HandoffAborted(
                self.handoff_id,
                f"the publisher has {offer.num_tokens} tokens, {self.end_token} were asked for",
            )
        if self.prompt and offer.prompt != self.prompt:
            raise HandoffAborted(
                self.handoff_id,
                f"the publisher holds KV of another prompt ({offer.prompt or 'unnamed'}, not "
                f"{self.prompt})",
            )
        end_head = offer.layout.head_start + offer.layout.num_kv_heads_local
        if not offer.layout.head_start <= source.first_head <= source.end_head <= end_head:
            raise RemoteProtocolError(
                f"prefill rank {source.tp_rank} holds heads [{offer.layout.head_start}, "
                f"{end_head}), expected [{source.first_head}, {source.end_head}) among them"
            )

    def read_all(self) -> None:
        """Read every part into the sink, then make every publisher confirm the end."""
        for part in self.parts:
            if part.source.first_head < part.source.end_head:
                self._read_part(part)
        for part in self.parts:
            self.check_time()
            self.result = part.channel.end(Outcome.CONSUMED) or self.result
            part.ended = True

    def give_up(self, exc: BaseException) -> None:
        """Tell every publisher that still waits; close every channel."""
        for part in self.parts:
            if not part.ended:
                with contextlib.suppress(DisaggError):
                    part.channel.end(Outcome.FAILED, f"{type(exc).__name__}: {exc}")
            part.channel.close()

    def _read_part(self, part: Part) -> None:
        block_tokens = self.layout.block_size_tokens
        aligned = self.first_token % block_tokens == 0
        alike = part.offer.layout == self.layout
        form: Form = part.offer.form if aligned and alike else "canonical"
        if form == "canonical":
            self.form = form
            if part.offer.form == "native" and passes_rows(part.channel, part.offer.layout):
                self._read_mapped(part)
                return
        step = self._tokens_per_read(part, form)
        for first, end in token_pieces(self.first_token, self.end_token, step, block_tokens):
            if form == "native":
                self._read_native(part, first, end)
            else:
                self._read_canonical(part, first, end)

    def _read_native(self, part: Part, first_token: int, end_token: int) -> None:
        layout = self.layout
        first_block = first_token // layout.block_size_tokens
        num_blocks = layout.num_blocks(end_token) - first_block
        items = part.channel.read(
            first_token=first_token,
            end_token=end_token,
            first_head=part.source.first_head,
            end_head=part.source.end_head,
            form="native",
            place=_place(self.sink, first_block, num_blocks),
        )
        layer_at, block = -1, 0
        for layer, rows in items:
            if layer != layer_at:
                layer_at, block = layer, first_block
            if rows:
                self.sink.write_native(layer, block, rows)
                block += len(rows) // layout.row_bytes
            self.check_time()
        self.payload_bytes += layout.num_layers * num_blocks * layout.row_bytes

    def _read_canonical(self, part: Part, first_token: int, end_token: int) -> None:
        first_head, end_head = part.source.first_head, part.source.end_head
        block_tokens, heads = self.layout.block_size_tokens, end_head - first_head
        buffer = memoryview(bytearray(self.layout.canonical_bytes(end_token - first_token, heads)))
        pieces: list[tuple[int, memoryview]] = []
        at = 0
        for first, end in token_pieces(first_token, end_token, self._step(heads), block_tokens):
            num_bytes = self.layout.canonical_bytes(end - first, heads)
            pieces.append((first, buffer[at : at + num_bytes]))
            at += num_bytes
        # All keys come before all values; each piece has its keys beside its values.
        targets = [piece[: len(piece) // 2] for _, piece in pieces]
        targets += [piece[len(piece) // 2 :] for _, piece in pieces]
        items = part.channel.read(
            first_token=first_token,
            end_token=end_token,
            first_head=first_head,
            end_head=end_head,
            form="canonical",
            place=lambda _: targets,
        )
        for layer, kv in items:
            _fill(targets, kv)
            for first, piece in pieces:
                self.sink.write_canonical(layer, first, first_head, end_head, piece)
                self.check_time()
            self.payload_bytes += len(buffer)

    def _read_mapped(self, part: Part) -> None:
        """Convert rows of the publisher's layout in the memory that it shares, piece by piece.

        They cross no socket, and are read once.
        """
        first_head, end_head = part.source.first_head, part.source.end_head
        theirs, block_tokens = part.offer.layout, self.layout.block_size_tokens
        step = self._step(end_head - first_head)
        scratch = np.empty(self.layout.canonical_bytes(step, end_head - first_head), np.uint8)
        # Whole rows that begin at most one row before the tokens are at most the bound.
        per_read = (MAX_DATA_BYTES // theirs.row_bytes - 1) * theirs.block_size_tokens
        per_read = max(1, per_read // block_tokens) * block_tokens
        for first, end in token_pieces(self.first_token, self.end_token, per_read, block_tokens):
            start = first // theirs.block_size_tokens * theirs.block_size_tokens
            items = part.channel.read(
                first_token=start,
                end_token=end,
                first_head=first_head,
                end_head=end_head,
                form="native",
            )
            for layer, view in items:
                rows = np.frombuffer(view, np.uint8).reshape(-1, theirs.row_bytes)
                for at, until in token_pieces(first, end, step, block_tokens):
                    kv = to_canonical(
                        rows,
                        theirs,
                        first_token=at - start,
                        num_tokens=until - at,
                        first_head=first_head,
                        end_head=end_head,
                        out=scratch,
                    )
                    self.sink.write_canonical(layer, at, first_head, end_head, kv.data)
                    self.payload_bytes += kv.nbytes
                    self.check_time()

    def _step(self, heads: int) -> int:
        """Return the tokens, in whole blocks, that the sink gets at a time in canonical form."""
        block_tokens = self.layout.block_size_tokens
        blocks = PIECE_BYTES // self.layout.canonical_bytes(block_tokens, heads)
        return max(1, blocks) * block_tokens

    def _tokens_per_read(self, part: Part, form: Form) -> int:
        """Return how many tokens, in whole blocks, one READ asks for."""
        layout = self.layout
        heads = part.source.end_head - part.source.first_head
        in_place = form == "native" and getattr(part.channel, "passes_memory", False)
        bound = MAX_DATA_BYTES if in_place else READ_BYTES
        blocks = bound // layout.canonical_bytes(layout.block_size_tokens, heads)
        return max(1, blocks) * layout.block_size_tokens

    def check_time(self) -> None:
        """Raise HandoffTimeout when the whole load has taken ``load_s``.

        Raises:
            HandoffAborted: The load was cancelled.
        """
        self.cancellation.check(self.handoff_id)
        if time.monotonic() >= self.deadline_s:
            raise HandoffTimeout(
                self.handoff_id,
                "end of the load",
                setting="handoff.load_s",
                timeout_s=self.load_s,
            )


def _fill(targets: list[memoryview], kv: memoryview) -> None:
    """Copy what a transport has yielded and not placed."""
    at = 0
    for target in targets if kv else ():
        target[:] = kv[at : at + len(target)]
        at += len(target)


def passes_rows(channel: Channel, theirs: KVLayout) -> bool:
    """Return whether rows of a publisher with this layout can be read here as they are staged."""
    return getattr(channel, "passes_memory", False) and theirs.packing == "plain"


def _place(sink: Sink, first_block: int, num_blocks: int) -> Place | None:
    if not isinstance(sink, DirectSink):
        return None
    return lambda layer: sink.native_targets(layer, first_block, num_blocks)
