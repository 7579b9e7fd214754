"""What engines, the handoff core and transports say to each other.

An engine's *prefill* side opens a ``Publication`` in its ``PublicationStore``
(``publications.py``), writes block rows layer by layer and marks them readable. A transport's
``Listener`` serves the store to peers. An engine's *decode* side asks a ``HandoffReader``
(``reader.py``) to load a token range; the reader opens a ``Channel`` through a transport and hands
the bytes to the engine's ``Sink``. Everything here is synchronous and thread-safe where it says
so; time-outs come from the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
    from disagg_plugins.handoff.publications import PublicationStore
    from disagg_plugins.policy import HandoffPolicy
    from disagg_plugins.types import HandoffId, TransportCapabilities

Form = Literal["native", "canonical"]
"""``native``: whole block rows as staged (equal layouts). ``canonical``: see ``layouts.py``."""


Place = Callable[[int], Sequence[memoryview] | None]
"""Layer -> writable views that its bytes fill, in order; None: none, yield them."""


class Outcome(StrEnum):
    """How a handoff ended; every handoff ends exactly once."""

    CONSUMED = "consumed"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one rank of a prefill worker serves its publications.

    Travels as JSON in the HTTP requests (``to_json``/``from_json`` in ``handoff/endpoints.py``).

    Attributes:
        tp_rank: Tensor-parallel rank that serves here.
        tp_size: Ranks of the worker.
        host_id: Equal on two processes that may share memory (boot id and IPC namespace).
        addresses: Transport name -> address in that transport's own form, at most 256 characters.
    """

    tp_rank: int
    tp_size: int
    host_id: str
    addresses: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a publisher answers to a claim.

    Attributes:
        num_tokens: Tokens that will be published (valid tokens; the last block may hold fewer).
        layout: The publisher's layout for this rank.
        form: How ``Channel.read`` will deliver.
        prompt: Digest of the prompt whose KV this is (``prompts.py``); empty where unknown.
    """

    num_tokens: int
    layout: KVLayout
    form: Form
    prompt: str = ""


class Channel(Protocol):
    """One authenticated connection to one rank of a prefill worker. Not thread-safe.

    At most one handoff is claimed on a channel at a time. Every method that waits is bounded by
    the policy and raises ``HandoffTimeout`` or ``TransportError``; after either the channel is
    closed by the caller and never reused.
    """

    def claim(self, ticket: str, *, within_s: float | None = None, wait_s: float = 0.0) -> Offer:
        """Claim the handoff of ``ticket``.

        The form is ``native`` when both layouts are equal field by field, else ``canonical``.

        Args:
            ticket: The signed text.
            within_s: Everything from here to the publisher's word must fit in this; None:
                the policy's ``load_s``.
            wait_s: How long the publisher may wait for the engine to open the handoff; 0 where it
                must be open by now.

        Raises:
            AuthenticationError: The ticket is false, foreign or expired.
            IncompatiblePeerError: The fingerprints differ; no byte of KV was written.
            HandoffAborted: Unknown, already claimed, expired or ended.
            TransportError: The connection failed.
        """
        ...

    def read(
        self,
        *,
        first_token: int,
        end_token: int,
        first_head: int,
        end_head: int,
        form: Form | None = None,
        place: Place | None = None,
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield ``(layer, bytes)`` for every layer of the publisher, in order.

        Waits for layers that are still being computed. Native form: whole block rows of the
        blocks that cover ``[first_token, end_token)``, ``first_token`` on a block boundary, all
        heads; bytes of shape ``(blocks * row_bytes,)``, one layer perhaps in several pieces of
        whole rows. Canonical form: ``[2, tokens, heads, head_dim]`` for exactly the asked tokens
        and global heads. A view is valid until the next item is asked for: copy from it, do not
        keep it.

        Args:
            first_token: First token.
            end_token: End of the half-open range.
            first_head: First global KV head.
            end_head: End of the half-open range of heads.
            form: None is the offered one; ``canonical`` may always be asked for, ``native`` only
                where it was offered.
            place: Where a transport that receives bytes may put a layer's; then the layer is
                yielded once, with an empty view. Transports that share memory do not ask.
        """
        ...

    def end(self, outcome: Outcome, detail: str = "") -> bytes:
        """Tell the publisher how the handoff ended and wait for its word.

        Returns:
            What the publishing engine left beside the KV (``Publication.result``); often empty.

        Raises:
            HandoffAborted: The publisher had ended the handoff before (its lease ran out): what
                was read may have been overwritten and must not be used.
        """
        ...

    def shut(self) -> None:
        """Make a call that waits in another thread raise soon; the caller still closes."""
        ...

    def close(self) -> None:
        """Close the connection; idempotent. An unfinished claim fails on the publisher."""
        ...


class Listener(Protocol):
    """Serves one ``PublicationStore`` to peers from threads of its own."""

    @property
    def address(self) -> str:
        """Where peers connect, in this transport's own form."""
        ...

    def close(self) -> None:
        """Stop accepting, end open connections, join the threads; idempotent, bounded."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """What one rank says of itself in the handshake.

    Attributes:
        name: Shown in errors: worker name, engine and rank.
        fingerprint: The model.
        layout: The rank's layout.
        tp_rank: Tensor-parallel rank within the worker.
        tp_size: Ranks of the worker.
    """

    name: str
    fingerprint: ModelFingerprint
    layout: KVLayout
    tp_rank: int = 0
    tp_size: int = 1


class Transport(Protocol):
    """A way to move KV, offered by ``disagg_register_transports``."""

    name: str
    capabilities: TransportCapabilities

    def listen(
        self, store: PublicationStore, identity: Identity, *, secret: bytes, policy: HandoffPolicy
    ) -> Listener:
        """Serve ``store``; binds within ``policy.listen_host``."""
        ...

    def connect(
        self, address: str, identity: Identity, *, secret: bytes, policy: HandoffPolicy
    ) -> Channel:
        """Open and authenticate a channel; both sides prove the secret.

        Raises:
            AuthenticationError: The peer does not hold the secret.
            IncompatiblePeerError: Protocol versions or fingerprints differ.
            TransportError: Nobody listens, or the time-out ended.
        """
        ...


class Sink(Protocol):
    """Where the decode side of an engine puts what a reader delivers."""

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        """Take whole block rows of one layer.

        Args:
            layer: Layer of this rank.
            first_block: Block of the *request* (0 holds token 0) that the first row is.
            rows: uint8, shape ``(blocks * row_bytes,)`` in this rank's own layout.
        """
        ...

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        """Take canonical KV of one layer.

        Args:
            layer: Layer of this rank.
            first_token: Token of the request that index 0 of the token axis is.
            first_head: First global KV head in ``kv``.
            end_head: End of the global head range.
            kv: uint8 bytes of ``[2, tokens, end_head - first_head, head_dim]`` elements.
        """
        ...


@runtime_checkable
class DirectSink(Sink, Protocol):
    """A sink that lets a transport receive block rows straight into the engine's memory.

    Saves one copy over tcp. Rows that a failed load has half written are the engine's to discard,
    as with every sink.
    """

    def native_targets(
        self, layer: int, first_block: int, num_blocks: int
    ) -> Sequence[memoryview] | None:
        """Return where rows ``[first_block, first_block + num_blocks)`` of the request belong.

        Returns:
            Writable contiguous uint8 views that hold the rows in order, together exactly
            ``num_blocks * row_bytes``; None to get them through ``write_native``.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did.

    Attributes:
        handoff_id: The handoff.
        transport: The transport used, ``+``-joined when ranks differ.
        form: ``native`` or ``canonical``.
        num_tokens: Tokens loaded.
        payload_bytes: Bytes of KV moved to this rank.
        seconds: Wall-clock seconds from connect to the publisher's word.
        result: What the publishing engine left beside the KV; often empty.
        prompt: Digest of the prompt whose KV it is, as the publisher told; empty: it told none.
    """

    handoff_id: HandoffId
    transport: str
    form: Form
    num_tokens: int
    payload_bytes: int
    seconds: float
    result: bytes = b""
    prompt: str = ""


class Unpack(Protocol):
    """Turns an engine's packed block rows into plain ``hctd`` rows; given by its adapter."""

    def __call__(self, rows: memoryview) -> memoryview:
        """Return plain rows for packed ``rows`` (uint8, whole block rows of one layer)."""
        ...
