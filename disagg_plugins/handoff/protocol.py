"""The conversation of one connection, without I/O.

Rules:

1. ``HELLO`` (client) - ``CHALLENGE`` (server) - ``AUTH`` (client) - ``WELCOME`` (server). Both
   prove the secret over both random numbers, with different labels, so neither can be reflected.
   Before ``AUTH`` is right the server says nothing but a random number and a version.
2. Then, any number of times: ``CLAIM`` - ``OFFER``, any number of ``READ`` - (``DATA`` or
   ``READY``, one entry a layer, in order), ``END`` - ``ENDED``. Where a claim may wait for the
   handoff to be opened, empty ``READY`` frames before the ``OFFER`` say that the server lives.
3. Whatever goes wrong, the server sends one ``ERROR`` and closes. The client closes.
4. The peers are authenticated, the bytes are not: whoever can rewrite packets between the two
   hosts can change KV. Run the transport over a network that you trust.

A session is told each frame's header first (``expect``), so that it can refuse a length before a
byte of the payload is read, and then the payload. It returns messages and builds bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from disagg_plugins.errors import (
    AuthenticationError,
    IncompatiblePeerError,
    LocalProtocolError,
    RemoteProtocolError,
)
from disagg_plugins.handoff.frames import (
    MAX_CONTROL_BYTES,
    MAX_DATA_BYTES,
    MAX_HELLO_BYTES,
    FrameType,
    Header,
    pack_frame,
    parse_header,
)
from disagg_plugins.handoff.interfaces import Form, Identity, Offer, Outcome
from disagg_plugins.handoff.keys import Purpose, derive_key, equal, sign
from disagg_plugins.handoff.layouts import PROTOCOL_VERSION, KVLayout, check_compatible
from disagg_plugins.handoff.messages import (
    Auth,
    Challenge,
    Claim,
    End,
    Ended,
    ErrorMessage,
    Hello,
    IdentityMessage,
    OfferMessage,
    Read,
    Welcome,
    decode,
    encode,
)
from disagg_plugins.handoff.remote_errors import exception_of

SUPPORTED_VERSIONS = (PROTOCOL_VERSION,)

Random = Callable[[int], bytes]
"""``os.urandom``, or something predictable in tests."""


class Phase(StrEnum):
    """Where a conversation stands."""

    START = "start"
    PROVING = "proving"
    IDLE = "idle"
    CLAIMING = "claiming"
    CLAIMED = "claimed"
    READING = "reading"
    ENDING = "ending"


def _transcript(
    label: bytes, hello: Hello, challenge: Challenge, extra: bytes = b""
) -> list[bytes]:
    return [label, encode(hello), encode(challenge), extra]


class ServerSession:
    """The publisher's side of one connection.

    Args:
        identity: Told to the peer after it has proved the secret.
        secret: The fleet's shared secret.
        random: Source of random bytes.
    """

    _ACCEPTS = {
        Phase.START: {FrameType.HELLO},
        Phase.PROVING: {FrameType.AUTH},
        Phase.IDLE: {FrameType.CLAIM},
        Phase.CLAIMED: {FrameType.READ, FrameType.END},
    }

    def __init__(self, identity: Identity, *, secret: bytes, random: Random) -> None:
        self.phase = Phase.START
        self.identity = identity
        self.peer: Identity | None = None
        self._key = derive_key(secret, Purpose.HANDSHAKE)
        self._random = random
        self._hello: Hello | None = None
        self._challenge: Challenge | None = None

    @property
    def authenticated(self) -> bool:
        """Whether the peer has proved the secret."""
        return self.phase not in (Phase.START, Phase.PROVING)

    def expect(self, data: bytes | bytearray | memoryview) -> Header:
        """Read a header and refuse what may not come now.

        Raises:
            RemoteProtocolError: Malformed, too long, or out of order.
        """
        limit = MAX_CONTROL_BYTES if self.authenticated else MAX_HELLO_BYTES
        header = parse_header(data, max_bytes=limit)
        if header.type not in self._ACCEPTS.get(self.phase, set()):
            raise RemoteProtocolError(f"{header.type.name} is out of order while {self.phase}")
        if header.payload_bytes > limit:
            raise RemoteProtocolError(f"{header.type.name} of {header.payload_bytes} bytes")
        return header

    def hello(self, payload: bytes) -> bytes:
        """Take a HELLO; return the CHALLENGE frame.

        Raises:
            IncompatiblePeerError: No protocol version in common.
            RemoteProtocolError: Malformed.
        """
        hello = decode(payload, Hello)
        common = set(hello.versions) & set(SUPPORTED_VERSIONS)
        if not common:
            raise IncompatiblePeerError(
                [("protocol version", str(SUPPORTED_VERSIONS), str(tuple(hello.versions)))],
                ours="publisher",
                theirs="peer",
            )
        self._hello = hello
        self._challenge = Challenge(self._random(32), max(common))
        self.phase = Phase.PROVING
        return pack_frame(FrameType.CHALLENGE, encode(self._challenge))

    def auth(self, payload: bytes) -> bytes:
        """Take an AUTH; return the WELCOME frame.

        Raises:
            AuthenticationError: The proof is false.
            RemoteProtocolError: Malformed.
        """
        if self._hello is None or self._challenge is None:
            raise LocalProtocolError("auth before hello")
        proof = decode(payload, Auth).proof
        if not equal(proof, sign(self._key, *_transcript(b"client", self._hello, self._challenge))):
            raise AuthenticationError("the peer does not hold this fleet's secret")
        identity = encode(IdentityMessage.of(self.identity))
        ours = sign(self._key, *_transcript(b"server", self._hello, self._challenge, identity))
        self.phase = Phase.IDLE
        return pack_frame(FrameType.WELCOME, encode(Welcome(ours, identity)))

    def claim(self, payload: bytes) -> Claim:
        """Take a CLAIM; return it, with ``peer`` set to who claims.

        Raises:
            IncompatiblePeerError: The models or the layers of the ranks differ.
            RemoteProtocolError: Malformed.
        """
        claim = decode(payload, Claim)
        peer = claim.identity.identity()
        check_identities(self.identity, peer)
        self.peer = peer
        self.phase = Phase.CLAIMING
        return claim

    def offer(self, num_tokens: int, prompt: str = "") -> bytes:
        """Return the OFFER frame for an accepted claim."""
        form = form_between(self.identity.layout, self._claimer().layout)
        layout = IdentityMessage.of(self.identity).layout
        self.phase = Phase.CLAIMED
        return pack_frame(FrameType.OFFER, encode(OfferMessage(num_tokens, layout, form, prompt)))

    def read(self, payload: bytes, num_tokens: int) -> Read:
        """Take a READ of a handoff of ``num_tokens`` tokens.

        Raises:
            RemoteProtocolError: Malformed, outside what was offered, or too much at once.
        """
        read = decode(payload, Read)
        ours = self.identity.layout
        last_head = ours.head_start + ours.num_kv_heads_local
        if not (
            read.first_token < read.end_token <= num_tokens
            and ours.head_start <= read.first_head < read.end_head <= last_head
        ):
            raise RemoteProtocolError(
                f"READ of tokens [{read.first_token}, {read.end_token}) and heads "
                f"[{read.first_head}, {read.end_head}) is outside the {num_tokens} tokens and "
                f"heads [{ours.head_start}, {last_head}) that were offered"
            )
        if read.form == "native" and (
            read.first_token % ours.block_size_tokens
            or form_between(ours, self._claimer().layout) != "native"
        ):
            raise RemoteProtocolError("native READ between unlike layouts or inside a block")
        if read_bytes(read, ours) > MAX_DATA_BYTES:
            raise RemoteProtocolError(
                f"READ of {read_bytes(read, ours)} bytes a layer, at most {MAX_DATA_BYTES}"
            )
        return read

    def end(self, payload: bytes) -> tuple[Outcome, str]:
        """Take an END; return the peer's word.

        Raises:
            RemoteProtocolError: Malformed.
        """
        end = decode(payload, End)
        self.phase = Phase.ENDING
        return Outcome(end.outcome), end.detail

    def ended(self, *, held: bool, detail: str, result: bytes = b"") -> bytes:
        """Return the ENDED frame; the connection is free for another claim."""
        self.phase = Phase.IDLE
        return pack_frame(FrameType.ENDED, encode(Ended(held, detail[:8192], result)))

    def _claimer(self) -> Identity:
        if self.peer is None:
            raise LocalProtocolError("nothing is claimed on this connection")
        return self.peer


class ClientSession:
    """The reader's side of one connection.

    Args:
        identity: Told to the peer with a claim, after it has proved the secret.
        secret: The fleet's shared secret.
        random: Source of random bytes.
    """

    _ACCEPTS = {
        Phase.START: {FrameType.CHALLENGE},
        Phase.PROVING: {FrameType.WELCOME},
        Phase.CLAIMING: {FrameType.OFFER, FrameType.READY},
        Phase.READING: {FrameType.DATA, FrameType.READY},
        Phase.ENDING: {FrameType.ENDED},
    }

    def __init__(self, identity: Identity, *, secret: bytes, random: Random) -> None:
        self.phase = Phase.START
        self.identity = identity
        self.peer: Identity | None = None
        self.handoff_id = ""
        self._key = derive_key(secret, Purpose.HANDSHAKE)
        self._hello = Hello(random(32), list(SUPPORTED_VERSIONS))
        self._challenge: Challenge | None = None
        self._offer: Offer | None = None

    def expect(self, data: bytes | bytearray | memoryview) -> Header:
        """Read a header and refuse what may not come now; an ERROR may always come.

        Raises:
            RemoteProtocolError: Malformed, too long, or out of order.
        """
        header = parse_header(data, max_bytes=MAX_DATA_BYTES)
        if header.type is not FrameType.ERROR and (
            header.type not in self._ACCEPTS.get(self.phase, set())
        ):
            raise RemoteProtocolError(f"{header.type.name} is out of order while {self.phase}")
        return header

    def hello(self) -> bytes:
        """Return the HELLO frame."""
        return pack_frame(FrameType.HELLO, encode(self._hello))

    def challenge(self, payload: bytes) -> bytes:
        """Take a CHALLENGE; return the AUTH frame.

        Raises:
            RemoteProtocolError: Malformed, or a version that was not offered.
        """
        challenge = decode(payload, Challenge)
        if challenge.version not in SUPPORTED_VERSIONS:
            raise RemoteProtocolError(f"the peer chose version {challenge.version}, never offered")
        self._challenge = challenge
        self.phase = Phase.PROVING
        proof = sign(self._key, *_transcript(b"client", self._hello, challenge))
        return pack_frame(FrameType.AUTH, encode(Auth(proof)))

    def welcome(self, payload: bytes) -> Identity:
        """Take a WELCOME; return who the peer is.

        Raises:
            AuthenticationError: The proof is false.
            IncompatiblePeerError: The models or the layers of the ranks differ.
            RemoteProtocolError: Malformed.
        """
        if self._challenge is None:
            raise LocalProtocolError("welcome before challenge")
        welcome = decode(payload, Welcome)
        expected = sign(
            self._key, *_transcript(b"server", self._hello, self._challenge, welcome.identity)
        )
        if not equal(welcome.proof, expected):
            raise AuthenticationError("the publisher does not hold this fleet's secret")
        peer = decode(welcome.identity, IdentityMessage).identity()
        check_identities(self.identity, peer)
        self.peer = peer
        self.phase = Phase.IDLE
        return peer

    def claim(self, handoff_id: str, ticket: str, wait_s: float = 0.0) -> bytes:
        """Return the CLAIM frame; ``handoff_id`` is only for error messages."""
        self._require(Phase.IDLE, "claim")
        self.handoff_id = handoff_id
        self.phase = Phase.CLAIMING
        return pack_frame(
            FrameType.CLAIM, encode(Claim(ticket, IdentityMessage.of(self.identity), wait_s))
        )

    def offer(self, payload: bytes) -> Offer:
        """Take an OFFER.

        Raises:
            RemoteProtocolError: Malformed, or not what this peer said of itself.
        """
        message = decode(payload, OfferMessage)
        layout = message.layout.layout()
        if self.peer is None or layout != self.peer.layout:
            raise RemoteProtocolError("the offered layout is not the one of the handshake")
        if message.form != form_between(layout, self.identity.layout):
            raise RemoteProtocolError(f"form {message.form} does not follow from the two layouts")
        self._offer = Offer(message.num_tokens, layout, message.form, message.prompt)
        self.phase = Phase.CLAIMED
        return self._offer

    def read(self, read: Read) -> tuple[bytes, int]:
        """Return the READ frame and the exact bytes that every layer must have.

        Raises:
            LocalProtocolError: Nothing is claimed, or the ranges are outside the offer.
        """
        self._require(Phase.CLAIMED, "read")
        offer = self._offer
        if offer is None:
            raise LocalProtocolError("read before an offer")
        layer_bytes = read_bytes(read, offer.layout)
        if not 0 < layer_bytes <= MAX_DATA_BYTES or read.end_token > offer.num_tokens:
            raise LocalProtocolError(f"{read} does not fit {offer}: {layer_bytes} bytes a layer")
        if read.form == "native" and offer.form != "native":
            raise LocalProtocolError("native read was not offered")
        self.phase = Phase.READING
        return pack_frame(FrameType.READ, encode(read)), layer_bytes

    def read_done(self) -> None:
        """Every layer has come."""
        self.phase = Phase.CLAIMED

    def end(self, outcome: Outcome, detail: str) -> bytes:
        """Return the END frame."""
        self._require(Phase.CLAIMED, "end")
        self.phase = Phase.ENDING
        word = "consumed" if outcome is Outcome.CONSUMED else "failed"
        return pack_frame(FrameType.END, encode(End(word, detail[:1024])))  # type: ignore[arg-type]

    def ended(self, payload: bytes) -> Ended:
        """Take an ENDED; the connection is free for another claim.

        Raises:
            RemoteProtocolError: Malformed.
        """
        ended = decode(payload, Ended)
        self.phase = Phase.IDLE
        self._offer = None
        return ended

    def error(self, payload: bytes) -> Exception:
        """Take an ERROR; return the exception that it stands for."""
        message = decode(payload, ErrorMessage)
        return exception_of(message, handoff_id=self.handoff_id, ours=self.identity.name)

    def _require(self, phase: Phase, what: str) -> None:
        if self.phase is not phase:
            raise LocalProtocolError(f"{what} while {self.phase}")


def read_bytes(read: Read, layout: KVLayout) -> int:
    """Return the bytes of one layer that a READ of a rank with ``layout`` delivers."""
    tokens = read.end_token - read.first_token
    if tokens <= 0:
        return 0
    if read.form == "native":
        first_block = read.first_token // layout.block_size_tokens
        return (layout.num_blocks(read.end_token) - first_block) * layout.row_bytes
    return layout.canonical_bytes(tokens, read.end_head - read.first_head)


def form_between(a: KVLayout, b: KVLayout) -> Form:
    """Return ``native`` when whole rows may move as they are, else ``canonical``."""
    return "native" if a == b else "canonical"


def check_identities(ours: Identity, theirs: Identity) -> None:
    """Raise unless the two ranks may exchange KV.

    Raises:
        IncompatiblePeerError: The models, the dtypes or the layers of the ranks differ.
    """
    check_compatible(
        ours.fingerprint, theirs.fingerprint, our_name=ours.name, their_name=theirs.name
    )
    a, b = ours.layout, theirs.layout
    fields = ("num_layers", "num_kv_heads", "head_dim", "dtype")
    mismatches: list[tuple[str, object, object]] = [
        (f"layout.{field}", getattr(a, field), getattr(b, field))
        for field in fields
        if getattr(a, field) != getattr(b, field)
    ]
    if mismatches:
        raise IncompatiblePeerError(mismatches, ours=ours.name, theirs=theirs.name)
