"""One peer's connection to a publisher, served by one thread.

Every wait is bounded: the handshake by ``connect_s``, a claim that shows no life by its lease, a
READ by ``read_s`` of silence and ``load_s`` in all, an idle connection by twice the lease.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from disagg_plugins.errors import (
    AuthenticationError,
    DisaggError,
    HandoffTimeout,
    IncompatiblePeerError,
    LocalProtocolError,
    TransportError,
)
from disagg_plugins.handoff.canonical import to_canonical
from disagg_plugins.handoff.frames import FrameType, pack_frame, pack_header
from disagg_plugins.handoff.interfaces import Identity, Outcome
from disagg_plugins.handoff.protocol import ServerSession, read_bytes
from disagg_plugins.handoff.remote_errors import error_frame
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.handoff.wire import PeerGone, Wire

if TYPE_CHECKING:
    import socket

    from numpy.typing import NDArray

    from disagg_plugins.handoff.messages import Read
    from disagg_plugins.handoff.publications import Publication, PublicationStore
    from disagg_plugins.policy import HandoffPolicy

logger = logging.getLogger(__name__)

WAIT_SLICE_S = 0.05
"""How soon the death of a peer is noticed while it waits for rows that are being computed."""

KEEPALIVES_PER_SILENCE = 4
"""A waiting peer hears from us this often within its ``read_s``."""

FAREWELL_S = 0.5
"""Bound on sending an ERROR to a peer that may have stopped reading."""


class Delivery(Protocol):
    """How a transport tells a peer about native rows."""

    def welcome(self, wire: Wire, frame: bytes) -> None:
        """Send the WELCOME, with whatever the peer needs to read rows."""
        ...

    def send_rows(
        self,
        wire: Wire,
        publication: Publication,
        *,
        layer: int,
        layers: int,
        first_block: int,
        num_bytes: int,
    ) -> None:
        """Deliver ``num_bytes`` of rows from ``first_block`` on, of ``layers`` ready layers."""
        ...

    def close(self) -> None:
        """Release what the delivery holds; idempotent."""
        ...


class Connection:
    """Serves claims of one peer, one after the other."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        store: PublicationStore,
        identity: Identity,
        secret: bytes,
        policy: HandoffPolicy,
        delivery: Delivery,
        transport: str,
    ) -> None:
        self._wire = Wire(sock, transport=transport, silence_s=policy.connect_s)
        self._session = ServerSession(identity, secret=secret, random=os.urandom)
        self._store = store
        self._secret = secret
        self._policy = policy
        self._delivery = delivery
        self.shut_already = False
        self._claimed: Publication | None = None
        self._decode_rank = 0
        self._rows_due_s = 0.0  # until then the engine may not have begun with the prompt

    @property
    def authenticated(self) -> bool:
        """Whether the peer has proved the secret."""
        return self._session.authenticated

    def shut(self) -> None:
        """Make the serving thread end soon; callable from any thread."""
        self.shut_already = True
        self._wire.shut()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._wire.close()

    def run(self) -> None:
        """Serve until the peer leaves or something goes wrong; never raises."""
        try:
            self._handshake()
            self._wire.set_silence(self._policy.read_s)
            while True:
                self._serve_claim()
        except TransportError as exc:
            # As text: a kept log record would keep the error's frames, and with them the arena.
            logger.debug("a peer left: %s", str(exc))
        except DisaggError as exc:
            logger.info("a connection ended: %s", str(exc))
            self._farewell(exc)
        except Exception as exc:
            logger.exception("serving a peer failed")
            self._farewell(exc)
        finally:
            if self._claimed is not None:
                self._store.peer_gone(self._claimed, self._decode_rank)
                self._claimed = None

    def _handshake(self) -> None:
        self._wire.deadline_s = time.monotonic() + self._policy.connect_s
        self._wire.send(self._session.hello(self._receive(FrameType.HELLO)[1]))
        frame = self._session.auth(self._receive(FrameType.AUTH)[1])
        self._delivery.welcome(self._wire, frame)
        self._wire.deadline_s = None

    def _serve_claim(self) -> None:
        self._wire.set_receive_silence(2 * self._policy.lease_s)
        claim = self._session.claim(self._receive(FrameType.CLAIM)[1])
        peer = claim.identity
        ticket = verify(self._secret, claim.ticket, self._store.wall_s())
        self._rows_due_s = time.monotonic() + claim.wait_s
        self._wait_open(ticket.handoff_id, claim.wait_s)
        self._claimed = self._store.claim(ticket.handoff_id, peer.tp_rank, peer.tp_size)
        self._decode_rank = peer.tp_rank
        publication = self._claimed
        self._wire.send(self._session.offer(publication.num_tokens, publication.prompt))
        while True:
            frame_type, payload = self._receive(FrameType.READ)
            if frame_type is FrameType.END:
                break
            read = self._session.read(payload, publication.num_tokens)
            self._wire.deadline_s = max(time.monotonic(), self._rows_due_s) + self._policy.load_s
            self._serve_read(publication, read)
            self._wire.deadline_s = None
        outcome, detail = self._session.end(payload)
        self._claimed = None
        if outcome is Outcome.CONSUMED:
            held = self._store.consumed(publication, self._decode_rank)
        else:
            held = not publication.state.ended
            self._store.failed(publication, f"the reader gave up: {detail}")
        word = "" if held else f"{publication.outcome}: {publication.state.detail}"
        self._wire.send(self._session.ended(held=held, detail=word, result=publication.result))

    def _wait_open(self, handoff_id: str, wait_s: float) -> None:
        """Wait until the engine has opened the handoff; then it is the claim that says what is."""
        if not wait_s:
            return
        policy = self._policy
        now_s = told_s = time.monotonic()
        deadline_s = now_s + wait_s
        while now_s < deadline_s and not self._store.wait_open(handoff_id, WAIT_SLICE_S):
            if self._wire.peer_gone():
                raise PeerGone(self._wire.transport, "the peer closed while waiting to claim")
            now_s = time.monotonic()
            if now_s - told_s >= policy.read_s / KEEPALIVES_PER_SILENCE:
                self._wire.send(pack_frame(FrameType.READY, b""))
                told_s = now_s

    def _serve_read(self, publication: Publication, read: Read) -> None:
        layout = self._store.identity.layout
        end_block = layout.num_blocks(read.end_token)
        first_block = read.first_token // layout.block_size_tokens
        layer = 0
        scratch = np.empty(0, np.uint8)
        if read.form == "canonical":
            # Once for all layers: the pages of new memory may cost more than the converting.
            scratch = np.empty(read_bytes(read, layout), np.uint8)
        while layer < layout.num_layers:
            ready = self._wait(publication, layer, end_block)
            if read.form == "native":
                self._delivery.send_rows(
                    self._wire,
                    publication,
                    layer=layer,
                    layers=ready,
                    first_block=first_block,
                    num_bytes=(end_block - first_block) * layout.row_bytes,
                )
            else:
                for each in range(layer, layer + ready):
                    self._send_canonical(publication, each, read, scratch)
            layer += ready
            self._store.renew(publication)

    def _wait(self, publication: Publication, layer: int, end_block: int) -> int:
        """Wait for rows; return how many layers are ready. Tells the peer that we live."""
        policy = self._policy
        progress = publication.progress
        started_s = told_s = time.monotonic()
        while True:
            ready = publication.wait_ready(layer, end_block, WAIT_SLICE_S)
            if ready:
                return ready
            if self._wire.peer_gone():
                raise PeerGone(self._wire.transport, "the peer closed while waiting for rows")
            now_s = time.monotonic()
            if publication.progress != progress:
                progress, started_s = publication.progress, now_s
            if not progress:  # opened, and queued by the engine: what the peer waits for as well
                started_s = max(started_s, min(now_s, self._rows_due_s))
            deadline_s = self._wire.deadline_s
            if now_s - started_s >= policy.read_s or (deadline_s and now_s >= deadline_s):
                raise HandoffTimeout(
                    publication.handoff_id,
                    f"rows of layer {layer} up to block {end_block} from the engine",
                    setting="handoff.read_s",
                    timeout_s=policy.read_s,
                )
            if now_s - told_s >= policy.read_s / KEEPALIVES_PER_SILENCE:
                self._wire.send(pack_frame(FrameType.READY, b""))
                told_s = now_s

    def _send_canonical(
        self, publication: Publication, layer: int, read: Read, scratch: NDArray[np.uint8]
    ) -> None:
        """Send one layer, converted into ``scratch``, whose beginning it fills."""
        layout = self._store.identity.layout
        first_block = read.first_token // layout.block_size_tokens
        blocks = layout.num_blocks(read.end_token) - first_block
        rows = self._store.arena.view(
            publication.row_offset(layer, first_block), blocks * layout.row_bytes
        )
        if layout.packing != "plain":
            if self._store.unpack is None:
                raise LocalProtocolError("packed rows and no unpack callback")
            plain = np.frombuffer(self._store.unpack(rows.data), dtype=np.uint8)
            if plain.nbytes != rows.nbytes:
                raise LocalProtocolError(f"unpack made {plain.nbytes} bytes of {rows.nbytes}")
            rows = plain
        kv = to_canonical(
            rows.reshape(blocks, layout.row_bytes),
            layout,
            first_token=read.first_token - first_block * layout.block_size_tokens,
            num_tokens=read.end_token - read.first_token,
            first_head=read.first_head,
            end_head=read.end_head,
            out=scratch,
        )
        # Whole layers: sent in pieces as they are converted, keys first, they cost a fifth more.
        self._wire.send_pair(pack_header(FrameType.DATA, kv.nbytes, layer), kv.data)

    def _receive(self, frame_type: FrameType) -> tuple[FrameType, bytes]:
        header = self._session.expect(self._wire.receive_header())
        return header.type, self._wire.receive_payload(header.payload_bytes)

    def _farewell(self, exc: Exception) -> None:
        """Tell the peer why; strangers are told only what they need to find their mistake."""
        if not self.authenticated and not isinstance(
            exc, AuthenticationError | IncompatiblePeerError
        ):
            return
        with contextlib.suppress(TransportError):
            self._wire.deadline_s = None
            self._wire.set_silence(FAREWELL_S)
            self._wire.send(error_frame(exc))
