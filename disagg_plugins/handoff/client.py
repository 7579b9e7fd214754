"""The reader's side of a socket transport: a ``Channel`` over one blocking socket."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from disagg_plugins.errors import (
    DisaggError,
    HandoffAborted,
    HandoffTimeout,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from disagg_plugins.handoff.frames import READY_ENTRY, FrameType, Header
from disagg_plugins.handoff.interfaces import Form, Identity, Offer, Outcome, Place
from disagg_plugins.handoff.messages import Read
from disagg_plugins.handoff.protocol import ClientSession
from disagg_plugins.handoff.tickets import peek_handoff_id
from disagg_plugins.handoff.wire import PeerSilent, Wire

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from disagg_plugins.policy import HandoffPolicy

PIECE_BYTES = 256 << 10
"""Rows are received in pieces of about this size, so that the sink copies from the core's cache:
1 MiB of rows cost 12% less CPU in 256 KiB pieces than in one (loopback, 1 MiB of L2)."""

NOTHING_LEFT = memoryview(b"")
"""Yielded for a layer whose bytes lie already where ``place`` wanted them."""

KEPT_BUFFER_BYTES = 8 << 20
"""A larger receive buffer is given back after the handoff, so idle channels stay small."""


class SocketChannel:
    """An authenticated connection to one rank of a prefill worker; see ``interfaces.Channel``.

    Construction performs the handshake and closes the socket if that fails.

    Args:
        sock: Connected; owned from here on.
        identity: Of this rank.
        secret: The fleet's shared secret.
        policy: Time-outs.
        transport: Named in errors.
        started_s: Monotonic time at which connecting began; ``connect_s`` counts from there.
    """

    passes_memory = False
    """Whether the publisher sends a descriptor along with its WELCOME."""

    def __init__(
        self,
        sock: socket.socket,
        identity: Identity,
        *,
        secret: bytes,
        policy: HandoffPolicy,
        transport: str,
        started_s: float,
    ) -> None:
        self._wire = Wire(sock, transport=transport, silence_s=policy.connect_s)
        self._policy = policy
        self._transport = transport
        self._session = ClientSession(identity, secret=secret, random=os.urandom)
        self._buffer = bytearray()
        self._offer: Offer | None = None
        self._within_s = policy.load_s
        try:
            self._wire.deadline_s = started_s + policy.connect_s
            self.peer = self._handshake()
            self._wire.deadline_s = None
            self._wire.set_silence(policy.read_s)
        except BaseException:
            self.close()
            raise

    @property
    def reusable(self) -> bool:
        """Whether the connection is idle and, as far as can be seen, healthy."""
        return self._session.phase == "idle" and self._wire.quiet()

    def claim(self, ticket: str, *, within_s: float | None = None, wait_s: float = 0.0) -> Offer:
        """Claim the handoff of ``ticket``; see ``interfaces.Channel``."""
        self._within_s = self._policy.load_s if within_s is None else within_s
        self._wire.deadline_s = time.monotonic() + self._within_s
        self._wire.set_silence(min(self._policy.read_s, max(self._within_s, 0.001)))
        self._send(self._session.claim(peek_handoff_id(ticket), ticket, wait_s))
        header = self._receive_header("offer")
        while header.type is FrameType.READY:
            if header.payload_bytes:
                raise RemoteProtocolError("READY with rows before an offer")
            header = self._receive_header("offer")
        self._offer = self._session.offer(self._receive_payload(header, "offer"))
        return self._offer

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
        """Yield the layers of a token and head range; see ``interfaces.Channel``."""
        if self._offer is None:
            raise HandoffAborted(self._session.handoff_id, "nothing is claimed on this channel")
        layout = self._offer.layout
        read = Read(first_token, end_token, first_head, end_head, form or self._offer.form)
        frame, layer_bytes = self._session.read(read)
        unit_bytes = layout.row_bytes if read.form == "native" else layer_bytes
        self._send(frame)
        layer = 0
        while layer < layout.num_layers:
            header = self._receive_header("rows")
            if header.type is FrameType.DATA:
                if header.tag != layer or header.payload_bytes != layer_bytes:
                    raise RemoteProtocolError(
                        f"DATA of layer {header.tag} with {header.payload_bytes} bytes, "
                        f"expected layer {layer} with {layer_bytes}"
                    )
                targets = None if place is None else place(layer)
                if targets is not None:
                    self._receive_scattered(targets, layer_bytes)
                    yield layer, NOTHING_LEFT
                else:
                    for num_bytes in piece_sizes(layer_bytes, unit_bytes):
                        yield layer, self._receive_bulk(num_bytes)
                layer += 1
                continue
            entries = self._receive_payload(header, "rows")
            for offset in ready_offsets(entries, layer, layer_bytes, layout.num_layers):
                yield layer, self._shared_rows(offset, layer_bytes)
                layer += 1
        self._session.read_done()

    def end(self, outcome: Outcome, detail: str = "") -> bytes:
        """Tell the publisher how it ended; see ``interfaces.Channel``."""
        self._send(self._session.end(outcome, detail))
        payload = self._receive_control("word on the end")
        ended = self._session.ended(payload)
        self._offer = None
        self._wire.deadline_s = None
        if len(self._buffer) > KEPT_BUFFER_BYTES:
            self._buffer = bytearray()
        if not ended.held and outcome is Outcome.CONSUMED:
            raise HandoffAborted(
                self._session.handoff_id,
                f"the publisher had ended it before ({ended.detail}); what was read is not used",
            )
        return ended.result

    def shut(self) -> None:
        """Make a call that waits in another thread raise soon."""
        self._wire.shut()

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._wire.close()
        self._buffer = bytearray()

    def _shared_rows(self, offset: int, num_bytes: int) -> memoryview:
        """Return rows in memory shared with the publisher; for transports that have it."""
        raise RemoteProtocolError(f"the peer offers shared memory over {self._transport}")

    def _take_memory(self, fd: int | None) -> None:
        """Take the descriptor that came with an authentic WELCOME; the caller closes it."""

    def _handshake(self) -> Identity:
        self._send(self._session.hello())
        self._send(self._session.challenge(self._receive_control("a challenge")))
        header, fd = self._receive_welcome()
        try:
            peer = self._session.welcome(self._receive_payload(header, "a welcome"))
            self._take_memory(fd)
        finally:
            if fd is not None:
                os.close(fd)
        return peer

    def _receive_welcome(self) -> tuple[Header, int | None]:
        if not self.passes_memory:
            return self._receive_header("a welcome"), None
        try:
            data, fd = self._wire.receive_header_and_fd()
        except PeerSilent as exc:
            raise self._timeout("a welcome") from exc
        try:
            return self._check_header(data, "a welcome"), fd
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise

    def _send(self, frame: bytes) -> None:
        try:
            self._wire.send(frame)
        except PeerSilent as exc:
            raise self._timeout("answer to a message") from exc
        except TransportError:
            self._raise_last_word()
            raise

    def _receive_header(self, what: str) -> Header:
        """Receive a header; an ERROR is raised as what it stands for."""
        try:
            data = self._wire.receive_header()
        except PeerSilent as exc:
            raise self._timeout(what) from exc
        return self._check_header(data, what)

    def _check_header(self, data: bytearray, what: str) -> Header:
        header = self._session.expect(data)
        if header.type is FrameType.ERROR:
            raise self._session.error(self._receive_payload(header, what))
        return header

    def _receive_payload(self, header: Header, what: str) -> bytes:
        try:
            return self._wire.receive_payload(header.payload_bytes)
        except PeerSilent as exc:
            raise self._timeout(what) from exc

    def _receive_control(self, what: str) -> bytes:
        return self._receive_payload(self._receive_header(what), what)

    def _receive_bulk(self, num_bytes: int) -> memoryview:
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        view = memoryview(self._buffer)[:num_bytes]
        try:
            self._wire.receive_into(view)
        except PeerSilent as exc:
            raise self._timeout("rows") from exc
        return view

    def _receive_scattered(self, targets: Sequence[memoryview], num_bytes: int) -> None:
        given = sum(len(target) for target in targets)
        if given != num_bytes:
            raise LocalProtocolError(f"a sink gave room for {given} bytes, {num_bytes} come")
        try:
            self._wire.receive_scattered(targets)
        except PeerSilent as exc:
            raise self._timeout("rows") from exc

    def _raise_last_word(self) -> None:
        """After a failed send: raise the ERROR that the publisher may have left before it went."""
        try:
            self._receive_header("a last word")
        except TransportError:
            return
        except HandoffTimeout:
            return

    def _timeout(self, what: str) -> DisaggError:
        """Return the error for a peer that kept silent or was too slow."""
        if self._session.handoff_id == "":
            return TransportError(
                self._transport,
                f"{what} did not come within {self._policy.connect_s:g} s "
                "(policy key handoff.connect_s)",
            )
        deadline_s = self._wire.deadline_s
        if deadline_s is not None and time.monotonic() >= deadline_s:
            setting, timeout_s = "handoff.load_s", self._within_s
        else:
            setting, timeout_s = "handoff.read_s", self._policy.read_s
        return HandoffTimeout(self._session.handoff_id, what, setting=setting, timeout_s=timeout_s)


def piece_sizes(layer_bytes: int, unit_bytes: int) -> Iterator[int]:
    """Yield sizes of whole units that sum up to ``layer_bytes``, each near ``PIECE_BYTES``."""
    step = max(1, PIECE_BYTES // unit_bytes) * unit_bytes
    for start in range(0, layer_bytes, step):
        yield min(step, layer_bytes - start)


def ready_offsets(payload: bytes, first_layer: int, layer_bytes: int, num_layers: int) -> list[int]:
    """Return the arena offsets in a READY payload; none in one that only says "still here".

    Raises:
        RemoteProtocolError: A layer is out of order, or its length is not the asked one.
    """
    if len(payload) % READY_ENTRY.size:
        raise RemoteProtocolError(f"READY of {len(payload)} bytes")
    offsets = []
    for index, (layer, offset, num_bytes) in enumerate(READY_ENTRY.iter_unpack(payload)):
        if layer != first_layer + index or layer >= num_layers or num_bytes != layer_bytes:
            raise RemoteProtocolError(
                f"READY of layer {layer} with {num_bytes} bytes, "
                f"expected layer {first_layer + index} of {num_layers} with {layer_bytes}"
            )
        offsets.append(offset)
    return offsets
