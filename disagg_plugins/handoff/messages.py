"""The control messages, as msgpack with every length bounded and unknown fields refused."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Annotated, Literal, TypeVar

import msgspec

from disagg_plugins.errors import ConfigError, RemoteProtocolError
from disagg_plugins.handoff.interfaces import Identity
from disagg_plugins.handoff.keys import DIGEST_BYTES
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint, RowOrder
from disagg_plugins.handoff.tickets import MAX_TICKET_CHARS

NONCE_BYTES = 32
MAX_TOKENS = 1 << 31
"""More than any context length, small enough that no product of sizes overflows 64 bits."""

MAX_RESULT_BYTES = 48 * 1024
"""What an engine may leave beside the KV: its first token and what it knows of it, a few KiB."""

Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
LongText = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Token = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class FingerprintMessage(_Message, frozen=True):
    """A ``ModelFingerprint``."""

    model: Text
    dtype: Text
    num_layers: Count
    num_kv_heads: Count
    head_dim: Count
    rope: LongText


class LayoutMessage(_Message, frozen=True):
    """A ``KVLayout``."""

    num_layers: Count
    num_kv_heads: Count
    head_start: Index
    num_kv_heads_local: Count
    head_dim: Count
    dtype: Text
    block_size_tokens: Count
    order: RowOrder
    packing: Text

    def layout(self) -> KVLayout:
        """Return the layout.

        Raises:
            RemoteProtocolError: The fields contradict each other.
        """
        try:
            return KVLayout(**msgspec.structs.asdict(self))
        except ConfigError as exc:
            raise RemoteProtocolError(f"the peer's layout is impossible: {exc}") from exc


class IdentityMessage(_Message, frozen=True):
    """An ``Identity``."""

    name: Text
    fingerprint: FingerprintMessage
    layout: LayoutMessage
    tp_rank: Index
    tp_size: Count

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(identity: Identity) -> IdentityMessage:
        """Return the message for ``identity``; remembered, since a rank has one."""
        return IdentityMessage(
            identity.name[:256],
            FingerprintMessage(**asdict(identity.fingerprint)),
            LayoutMessage(**asdict(identity.layout)),
            identity.tp_rank,
            identity.tp_size,
        )

    def identity(self) -> Identity:
        """Return the identity.

        Raises:
            RemoteProtocolError: The fields contradict each other.
        """
        if self.tp_rank >= self.tp_size:
            raise RemoteProtocolError(f"tp_rank {self.tp_rank} is not within {self.tp_size}")
        return Identity(
            self.name,
            ModelFingerprint(**msgspec.structs.asdict(self.fingerprint)),
            self.layout.layout(),
            self.tp_rank,
            self.tp_size,
        )


class Hello(_Message, frozen=True):
    """The client's first word: a random number and the protocol versions it speaks."""

    nonce: Nonce
    versions: Annotated[list[Index], msgspec.Meta(min_length=1, max_length=16)]


class Challenge(_Message, frozen=True):
    """The server's answer: its own random number and the version it chose."""

    nonce: Nonce
    version: Index


class Auth(_Message, frozen=True):
    """The client's proof that it holds the secret."""

    proof: Proof


class Welcome(_Message, frozen=True):
    """The server's proof, and the first thing it says about itself.

    Attributes:
        proof: Covers both random numbers and ``identity``.
        identity: An encoded ``IdentityMessage``.
    """

    proof: Proof
    identity: Annotated[bytes, msgspec.Meta(max_length=16 * 1024)]


class Claim(_Message, frozen=True):
    """The client wants the handoff of a ticket and says who it is.

    Attributes:
        ticket: The signed text.
        identity: The claiming rank.
        wait_s: How long the server may wait for the handoff to be opened; 0: not at all.
    """

    ticket: Annotated[str, msgspec.Meta(max_length=MAX_TICKET_CHARS)]
    identity: IdentityMessage
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0


class OfferMessage(_Message, frozen=True):
    """What the server will deliver."""

    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
    layout: LayoutMessage
    form: Literal["native", "canonical"]
    prompt: Annotated[str, msgspec.Meta(max_length=64)] = ""


class Read(_Message, frozen=True):
    """The client asks for all layers of a token and head range, both half-open and global."""

    first_token: Token
    end_token: Token
    first_head: Index
    end_head: Index
    form: Literal["native", "canonical"]


class End(_Message, frozen=True):
    """The client's word on how it ended."""

    outcome: Literal["consumed", "failed"]
    detail: Annotated[str, msgspec.Meta(max_length=1024)]


class Ended(_Message, frozen=True):
    """The server's word.

    Attributes:
        held: False when the handoff had ended before the client's END.
        detail: Why it had.
        result: What the publishing engine left with the KV (``Publication.result``).
    """

    held: bool
    detail: Annotated[str, msgspec.Meta(max_length=8192)]
    result: Annotated[bytes, msgspec.Meta(max_length=MAX_RESULT_BYTES)] = b""


class ErrorMessage(_Message, frozen=True):
    """Why the server ends the connection."""

    code: Literal["auth", "version", "incompatible", "aborted", "timeout", "protocol", "internal"]
    message: Annotated[str, msgspec.Meta(max_length=8192)]
    mismatches: Annotated[list[tuple[Text, str | int, str | int]], msgspec.Meta(max_length=32)] = []


M = TypeVar("M", bound=_Message)


def encode(message: _Message) -> bytes:
    """Return the msgpack bytes of ``message``."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes | bytearray | memoryview, message_type: type[M]) -> M:
    """Read one message.

    Raises:
        RemoteProtocolError: Not msgpack, a wrong type, a bound broken, or an unknown field.
    """
    try:
        return msgspec.msgpack.decode(payload, type=message_type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"malformed {message_type.__name__}: {exc}") from exc
