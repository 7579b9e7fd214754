"""Both sessions joined by a wire that is a function call."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from disagg_plugins.errors import (
    AuthenticationError,
    IncompatiblePeerError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from disagg_plugins.handoff.frames import HEADER_BYTES, FrameType, pack_frame, pack_header
from disagg_plugins.handoff.interfaces import Identity, Outcome
from disagg_plugins.handoff.messages import Claim, Hello, IdentityMessage, Read, encode
from disagg_plugins.handoff.protocol import ClientSession, Phase, ServerSession
from disagg_plugins.testing.handoffs import FINGERPRINT, SECRET, rank_identity


def pair(
    client_secret: bytes = SECRET, decode: Identity | None = None
) -> tuple[ClientSession, ServerSession]:
    source = random.Random(4)
    client = ClientSession(
        decode or rank_identity("decode"), secret=client_secret, random=source.randbytes
    )
    server = ServerSession(rank_identity("prefill"), secret=SECRET, random=source.randbytes)
    return client, server


def payload(session: ClientSession | ServerSession, frame: bytes) -> bytes:
    """Give a frame to a session the way I/O does: header first, then the payload."""
    header = session.expect(frame[:HEADER_BYTES])
    assert header.payload_bytes == len(frame) - HEADER_BYTES
    return frame[HEADER_BYTES:]


def shake(client: ClientSession, server: ServerSession) -> None:
    challenge = server.hello(payload(server, client.hello()))
    welcome = server.auth(payload(server, client.challenge(payload(client, challenge))))
    client.welcome(payload(client, welcome))


def claim(client: ClientSession, server: ServerSession, num_tokens: int = 40) -> None:
    server.claim(payload(server, client.claim("h", "ticket")))
    client.offer(payload(client, server.offer(num_tokens)))


def test_whole_conversation_twice_on_one_connection() -> None:
    client, server = pair()
    shake(client, server)
    for _ in range(2):
        claim(client, server)
        frame, layer_bytes = client.read(Read(0, 40, 0, 4, "native"))
        assert layer_bytes == 3 * rank_identity("x").layout.row_bytes
        assert server.read(payload(server, frame), 40) == Read(0, 40, 0, 4, "native")
        client.expect(pack_header(FrameType.DATA, layer_bytes))
        client.read_done()
        end = server.end(payload(server, client.end(Outcome.CONSUMED, "")))
        assert end == (Outcome.CONSUMED, "")
        assert client.ended(payload(client, server.ended(held=True, detail=""))).held
        assert client.phase is server.phase is Phase.IDLE


def test_wrong_secret_on_either_side() -> None:
    client, server = pair(client_secret=b"x" * 32)
    challenge = server.hello(payload(server, client.hello()))
    auth = client.challenge(payload(client, challenge))
    with pytest.raises(AuthenticationError):
        server.auth(payload(server, auth))
    assert not server.authenticated


def test_publisher_without_the_secret_is_found_out() -> None:
    client, server = pair()
    challenge = server.hello(payload(server, client.hello()))
    welcome = server.auth(payload(server, client.challenge(payload(client, challenge))))
    other, _ = pair(client_secret=b"x" * 32)
    other.challenge(payload(other, challenge))
    with pytest.raises(AuthenticationError, match="publisher"):
        other.welcome(payload(other, welcome))


def test_recorded_proofs_are_worthless_later() -> None:
    client, server = pair()
    challenge = server.hello(payload(server, client.hello()))
    auth = client.challenge(payload(client, challenge))
    again = ServerSession(rank_identity("p"), secret=SECRET, random=random.Random(9).randbytes)
    again.hello(payload(again, client.hello()))
    with pytest.raises(AuthenticationError):
        again.auth(payload(again, auth))


def test_no_common_version() -> None:
    _, server = pair()
    with pytest.raises(IncompatiblePeerError, match="protocol version"):
        server.hello(encode(Hello(bytes(32), [77])))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"dtype": "float16"},
        {"num_kv_heads": 5},
        {"head_dim": 9},
        {"rope": "theta=1"},
        {"num_layers": 4},
    ],
)
def test_every_difference_of_the_models_is_named(change: dict[str, object]) -> None:
    other = replace(rank_identity("decode"), fingerprint=replace(FINGERPRINT, **change))  # type: ignore[arg-type]
    client, server = pair(decode=other)
    with pytest.raises(IncompatiblePeerError, match=next(iter(change))) as caught:
        shake(client, server)
    assert {"decode/0", "prefill/0"} == {caught.value.ours, caught.value.theirs}
    with pytest.raises(IncompatiblePeerError, match=next(iter(change))):
        server.claim(encode(Claim("t", IdentityMessage.of(other))))


@pytest.mark.parametrize("frame_type", FrameType)
def test_strangers_may_only_say_hello(frame_type: FrameType) -> None:
    _, server = pair()
    frame = pack_header(frame_type, 10)
    if frame_type is FrameType.HELLO:
        server.expect(frame)
        with pytest.raises(RemoteProtocolError, match="announces"):
            server.expect(pack_header(frame_type, 2000))
    else:
        with pytest.raises(RemoteProtocolError):
            server.expect(frame)


@pytest.mark.parametrize(
    "read",
    [
        Read(0, 41, 0, 4, "native"),
        Read(5, 5, 0, 4, "canonical"),
        Read(9, 5, 0, 4, "canonical"),
        Read(0, 40, 0, 5, "canonical"),
        Read(0, 40, 2, 2, "canonical"),
        Read(5, 40, 0, 4, "native"),
    ],
)
def test_reads_outside_the_offer_are_refused(read: Read) -> None:
    client, server = pair()
    shake(client, server)
    claim(client, server)
    with pytest.raises(RemoteProtocolError):
        server.read(encode(read), 40)


def test_native_is_refused_between_unlike_layouts() -> None:
    client, server = pair(decode=rank_identity("decode", block_size_tokens=8))
    shake(client, server)
    claim(client, server)
    with pytest.raises(RemoteProtocolError, match="unlike"):
        server.read(encode(Read(0, 40, 0, 4, "native")), 40)
    with pytest.raises(LocalProtocolError, match="not offered"):
        client.read(Read(0, 40, 0, 4, "native"))


def test_one_read_is_bounded() -> None:
    client, server = pair()
    shake(client, server)
    claim(client, server, num_tokens=1 << 30)
    with pytest.raises(RemoteProtocolError, match="at most"):
        server.read(encode(Read(0, 1 << 30, 0, 4, "canonical")), 1 << 30)
    with pytest.raises(LocalProtocolError):
        client.read(Read(0, 1 << 30, 0, 4, "canonical"))


def test_mutated_conversations_raise_only_our_errors() -> None:
    source = random.Random(21)
    for _ in range(400):
        client, server = pair()
        frames: list[bytes] = []
        try:
            for step in range(4):
                frames.append(_step(client, server, step, frames, source))
        except ProtocolError:
            continue
    assert source.random() < 1


def _step(
    client: ClientSession,
    server: ServerSession,
    step: int,
    frames: list[bytes],
    source: random.Random,
) -> bytes:
    def noisy(frame: bytes) -> bytes:
        if source.random() < 0.5:
            return frame
        data = bytearray(frame)
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        return bytes(data)

    if step == 0:
        return noisy(client.hello())
    last = frames[-1]
    if step == 1:
        server.expect(last[:HEADER_BYTES])
        return noisy(server.hello(last[HEADER_BYTES:]))
    if step == 2:
        client.expect(last[:HEADER_BYTES])
        return noisy(client.challenge(last[HEADER_BYTES:]))
    server.expect(last[:HEADER_BYTES])
    return server.auth(last[HEADER_BYTES:])


def test_unknown_fields_are_refused() -> None:
    _, server = pair()
    raw = encode(Hello(bytes(32), [1]))
    assert raw[0] == 0x82
    more = b"\x83" + raw[1:] + b"\xa1x\x01"
    with pytest.raises(RemoteProtocolError, match="malformed"):
        server.hello(payload(server, pack_frame(FrameType.HELLO, more)))
