"""Publishers and readers in processes of their own, to be killed or stopped.

This program imports everything once and then forks a peer for each message on its socket, which
carries the peer's own socket along: a test that needs a process does not wait for its imports.

``publisher TRANSPORT`` tells address and ticket of an unpublished handoff, then publishes one layer
for each line it hears. ``reader TRANSPORT ADDRESS TICKET STEP`` goes as far as STEP.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import TextIO

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.handoff.interfaces import Outcome
from disagg_plugins.testing.handoffs import (
    HEADS,
    SECRET,
    World,
    quick_policy,
    rank_identity,
)

TRANSPORTS = {"tcp": TcpTransport, "shm": ShmTransport}


def publisher(wire: TextIO, name: str) -> None:
    """Serve one handoff."""
    world = World({name: TRANSPORTS[name]()}, policy=quick_policy(lease_s=30))
    opened = world.open(publish=False)
    told = {"address": world.listeners[0].address, "ticket": opened.ticket}
    print(json.dumps(told), file=wire, flush=True)
    for line in wire:
        opened.publish([int(line)])
        print("published", file=wire, flush=True)


def reader(wire: TextIO, name: str, address: str, ticket: str, step: str) -> None:
    """Read one handoff as far as ``step``, say so, and wait."""
    channel = TRANSPORTS[name]().connect(
        address, rank_identity("decode"), secret=SECRET, policy=quick_policy()
    )
    if step != "connected":
        channel.claim(ticket)
    if step in ("reading", "read", "ended"):
        rows = channel.read(first_token=0, end_token=40, first_head=0, end_head=HEADS)
        for layer, _ in rows:
            if step == "reading" and layer == 0:
                break
    if step == "ended":
        channel.end(Outcome.CONSUMED)
    print(step, file=wire, flush=True)
    wire.read()


def be_peer(fd: int, words: list[str]) -> None:
    """Be one peer until its work is done; never returns."""
    with socket.socket(fileno=fd) as sock, sock.makefile("rw", encoding="utf-8") as wire:
        print(os.getpid(), file=wire, flush=True)
        {"publisher": publisher, "reader": reader}[words[0]](wire, *words[1:])
    os._exit(0)


def main() -> None:
    """Fork peers until the socket closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps the peers.
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            message, fds, _, _ = socket.recv_fds(control, 4096, 1)
            if not message:
                return
            if os.fork() == 0:
                control.close()
                be_peer(fds[0], message.decode().split())
            os.close(fds[0])


if __name__ == "__main__":
    main()
