"""One blocking socket with time-outs kept by the kernel.

``SO_RCVTIMEO`` and ``SO_SNDTIMEO`` instead of ``settimeout``: Python's own time-outs make the
socket non-blocking and poll before every call, and then ``MSG_WAITALL`` cannot fill a buffer in
one system call. On top of the silence bound stands a deadline, which a peer that trickles single
bytes cannot move.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from disagg_plugins.errors import RemoteProtocolError, TransportError
from disagg_plugins.handoff.frames import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

IOV_VIEWS = 256
"""Buffers handed to one ``recvmsg``; Linux takes at most 1024 (UIO_MAXIOV)."""

SEND_BYTES = 512 << 10
"""One ``send`` of bulk bytes. A receiver that keeps up finds them in the cache still: over loopback
both ends together moved 3.4 GB per CPU-second in pieces of 512 KiB, 2.7 in pieces of 8 MiB, and 1.7
in pieces of 64 KiB, where system calls and wake-ups take over (Linux 6.18)."""

LOW_WATER_BYTES = 256 << 10
"""A thread that waits for bulk bytes is woken once this much is there (``SO_RCVLOWAT``), not for
every segment: 2.7 instead of 2.1 GB per CPU-second. The kernel lowers it where the receive buffer
is smaller, and the end of a connection wakes in any case (tcp(7), ``tcp_data_ready``)."""

_TIMEVAL = struct.Struct("@ll")
_FD_BYTES = array.array("i").itemsize


class PeerGone(TransportError):
    """The peer closed or reset the connection."""


class PeerSilent(TransportError):
    """The peer neither sent nor took anything in time."""


class Wire:
    """A connected stream socket; owns it.

    Args:
        sock: The socket; made blocking.
        transport: Named in errors.
        silence_s: Bound on one wait for the peer.
    """

    def __init__(self, sock: socket.socket, *, transport: str, silence_s: float) -> None:
        self.sock = sock
        self.transport = transport
        self.deadline_s: float | None = None
        self._header = bytearray(HEADER_BYTES)
        self._timeouts: dict[int, float] = {}
        self._closed = False
        sock.setblocking(True)
        self.set_silence(silence_s)

    def set_silence(self, silence_s: float) -> None:
        """Bound every single wait for the peer from now on."""
        self._set(socket.SO_RCVTIMEO, silence_s)
        self._set(socket.SO_SNDTIMEO, silence_s)

    def set_receive_silence(self, silence_s: float) -> None:
        """Bound every single wait for bytes from the peer from now on."""
        self._set(socket.SO_RCVTIMEO, silence_s)

    def send(self, data: bytes | memoryview) -> None:
        """Send everything."""
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            self._check_deadline("taking what was sent")
            try:
                sent += self.sock.send(view[sent : sent + SEND_BYTES])
            except OSError as exc:
                raise self._translate(exc, "taking what was sent") from exc

    def send_with_fd(self, data: bytes, fd: int) -> None:
        """Send a short frame and a descriptor with its first byte (Unix sockets)."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            sent = self.sock.sendmsg([data], ancillary)
        except OSError as exc:
            raise self._translate(exc, "taking what was sent") from exc
        self.send(memoryview(data)[sent:])

    def send_pair(self, header: bytes, payload: memoryview) -> None:
        """Send a header and its payload, the first piece of it with one system call."""
        self._check_deadline("taking what was sent")
        try:
            sent = self.sock.sendmsg([header, payload[:SEND_BYTES]])
        except OSError as exc:
            raise self._translate(exc, "taking what was sent") from exc
        if sent < len(header):
            self.send(header[sent:])
            sent = len(header)
        self.send(payload[sent - len(header) :])

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view`` completely."""
        self.receive_scattered([view])

    def receive_scattered(self, views: Sequence[memoryview]) -> None:
        """Fill ``views`` completely, one after the other."""
        rest = [view for view in views if len(view)]
        bulk, tail = split_tail(rest, LOW_WATER_BYTES)
        if bulk:
            # What follows the bulk is as long as the mark, so the mark is always reached.
            self._set_low_water(LOW_WATER_BYTES)
            try:
                self._fill(bulk)
            finally:
                self._set_low_water(1)
        self._fill(tail)

    def _fill(self, rest: list[memoryview]) -> None:
        while rest:
            try:
                count = self.sock.recvmsg_into(rest[:IOV_VIEWS], 0, socket.MSG_WAITALL)[0]
            except OSError as exc:
                raise self._translate(exc, "sending") from exc
            if count == 0:
                raise PeerGone(self.transport, "the peer closed the connection")
            full = 0
            while full < len(rest) and count >= len(rest[full]):
                count -= len(rest[full])
                full += 1
            del rest[:full]
            if count:
                rest[0] = rest[0][count:]
            self._check_deadline("sending")

    def _set_low_water(self, num_bytes: int) -> None:
        with contextlib.suppress(OSError):  # a hint: where it is not taken, nothing is lost
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)

    def receive_header(self) -> bytearray:
        """Return the next 16 bytes; valid until the next call."""
        self.receive_into(memoryview(self._header))
        return self._header

    def receive_header_and_fd(self) -> tuple[bytearray, int | None]:
        """Return the next 16 bytes and the descriptor that came with them, if any.

        The caller owns the descriptor. More than one is refused; none is ever left open.

        Raises:
            RemoteProtocolError: The peer sent more than one descriptor.
        """
        fds: list[int] = []
        try:
            got, ancillary, flags, _ = self.sock.recvmsg(
                HEADER_BYTES, socket.CMSG_LEN(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as exc:
            raise self._translate(exc, "sending") from exc
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += array.array("i", data[: len(data) // _FD_BYTES * _FD_BYTES])
        try:
            if len(fds) > 1 or flags & socket.MSG_CTRUNC:
                raise RemoteProtocolError("the peer sent more than one descriptor")
            if not got:
                raise PeerGone(self.transport, "the peer closed the connection")
            self._header[: len(got)] = got
            self.receive_into(memoryview(self._header)[len(got) :])
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return self._header, fds[0] if fds else None

    def receive_payload(self, num_bytes: int) -> bytes:
        """Return exactly ``num_bytes``; the caller has bounded them."""
        if not num_bytes:
            return b""
        payload = bytearray(num_bytes)
        self.receive_into(memoryview(payload))
        return bytes(payload)

    def peer_gone(self) -> bool:
        """Return at once whether the peer has closed its side."""
        poll = select.poll()
        hangup = getattr(select, "POLLRDHUP", select.POLLHUP)
        poll.register(self.sock, hangup)
        return bool(poll.poll(0))

    def quiet(self) -> bool:
        """Return at once whether nothing, not even an end, waits to be received."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poll.poll(0)

    def shut(self) -> None:
        """End both directions without closing; wakes a thread that is blocked on the socket."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; idempotent."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.sock.close()

    def _set(self, option: int, silence_s: float) -> None:
        if self._timeouts.get(option) == silence_s:
            return
        seconds = max(silence_s, 0.001)
        whole = int(seconds)
        value = _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
        self.sock.setsockopt(socket.SOL_SOCKET, option, value)
        self._timeouts[option] = silence_s

    def _check_deadline(self, what: str) -> None:
        if self.deadline_s is not None and time.monotonic() >= self.deadline_s:
            raise PeerSilent(self.transport, f"the peer was too slow {what}")

    def _translate(self, exc: OSError, what: str) -> TransportError:
        if isinstance(exc, BlockingIOError):
            return PeerSilent(self.transport, f"the peer stopped {what}")
        if isinstance(exc, ConnectionError):
            return PeerGone(self.transport, f"the connection was lost: {exc}")
        return TransportError(self.transport, f"{type(exc).__name__}: {exc}")


def split_tail(
    views: Sequence[memoryview], tail_bytes: int
) -> tuple[list[memoryview], list[memoryview]]:
    """Return ``views`` cut in two, the second part of ``tail_bytes`` bytes.

    Where the second part would be the larger one, it is all of them and the first part is empty.
    """
    left = sum(len(view) for view in views) - tail_bytes
    if left < tail_bytes:
        return [], list(views)
    bulk: list[memoryview] = []
    for index, view in enumerate(views):
        if len(view) > left:
            head = [view[:left]] if left else []
            return bulk + head, [view[left:], *views[index + 1 :]]
        bulk.append(view)
        left -= len(view)
    return bulk, []
