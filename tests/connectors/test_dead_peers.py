"""Real processes that are killed or stopped at every step of a handoff."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import HandoffTimeout, TransportError
from disagg_plugins.handoff.endpoints import local_host_id
from disagg_plugins.handoff.interfaces import Channel, Endpoint, Outcome
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.testing.handoffs import (
    HEADS,
    LAYERS,
    SECRET,
    WAIT_S,
    RecordingSink,
    World,
    open_descriptors,
    quick_policy,
    rank_identity,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = {"tcp": TcpTransport, "shm": ShmTransport}
STEPS = ["connected", "claimed", "reading", "read"]
POLICY = quick_policy(read_s=0.4, load_s=2.0, connect_s=0.5)


class Peer:
    """One forked process and the socket to it."""

    def __init__(self, control: socket.socket, words: tuple[str, ...]) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(WAIT_S)
        with theirs:
            socket.send_fds(control, [" ".join(words).encode()], [theirs.fileno()])
        self.sock = ours
        self.closed = False
        self.wire = ours.makefile("rw", encoding="utf-8")
        self.pid = int(self.line())

    def line(self) -> str:
        """Return the next line that the peer says."""
        return self.wire.readline().strip()

    def publish(self, layer: int) -> None:
        """Make a publisher publish one layer."""
        print(layer, file=self.wire, flush=True)
        assert self.line() == "published"

    def signal(self, sign: signal.Signals) -> None:
        """Kill or stop the process, and wait until that has happened."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sign)
        if sign is signal.SIGKILL:
            wait_until(self._gone, "the end of the killed process")
        else:
            wait_until(self._stopped, "the stop of every thread")

    def close(self) -> None:
        """Kill the peer if it lives, and close the socket."""
        if self.closed:
            return
        self.closed = True
        self.signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.wire.close()
        self.sock.close()

    def _stopped(self) -> bool:
        stats = Path(f"/proc/{self.pid}/task").glob("*/stat")
        return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats)

    def _gone(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False


Spawn = Callable[..., Peer]


@pytest.fixture(scope="module")
def control() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    paths = [str(ROOT), str(ROOT / "connectors"), os.environ.get("PYTHONPATH", "")]
    program = str(Path(__file__).with_name("peer_process.py"))
    with theirs:
        server = subprocess.Popen(
            [sys.executable, program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
    yield ours
    ours.close()
    server.wait(WAIT_S)


@pytest.fixture
def spawn(control: socket.socket) -> Iterator[Spawn]:
    peers: list[Peer] = []

    def start(*words: str) -> Peer:
        peers.append(Peer(control, words))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


def drive(child: Peer, told: dict[str, str], channel: Channel, step: str) -> Callable[[], object]:
    """Bring a handoff to ``step``; return what comes next."""
    if step == "connected":
        return lambda: channel.claim(told["ticket"])
    channel.claim(told["ticket"])
    rows = channel.read(first_token=0, end_token=40, first_head=0, end_head=HEADS)
    if step == "claimed":
        return lambda: next(rows)
    child.publish(0)
    next(rows)
    if step == "reading":
        return lambda: next(rows)
    for layer in range(1, LAYERS):
        child.publish(layer)
    assert len(list(rows)) == LAYERS - 1
    return lambda: channel.end(Outcome.CONSUMED)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TRANSPORTS)
def test_publisher_dies_or_stalls(spawn: Spawn, name: str, step: str, sign: signal.Signals) -> None:
    child = spawn("publisher", name)
    told = json.loads(child.line())
    before = open_descriptors()
    transport = TRANSPORTS[name]()
    channel = transport.connect(
        told["address"], rank_identity("decode"), secret=SECRET, policy=POLICY
    )
    try:
        go_on = drive(child, told, channel, step)
        child.signal(sign)
        started_s = time.monotonic()
        with pytest.raises((TransportError, HandoffTimeout)):
            go_on()
        assert time.monotonic() - started_s < 2.0
    finally:
        channel.close()
    assert open_descriptors() <= before


@pytest.mark.parametrize("name", TRANSPORTS)
def test_connecting_to_a_stopped_publisher_is_bounded(spawn: Spawn, name: str) -> None:
    child = spawn("publisher", name)
    told = json.loads(child.line())
    child.signal(signal.SIGSTOP)
    started_s = time.monotonic()
    with pytest.raises(TransportError, match="connect_s"):
        TRANSPORTS[name]().connect(
            told["address"], rank_identity("decode"), secret=SECRET, policy=POLICY
        )
    assert time.monotonic() - started_s < 2.0


@pytest.mark.parametrize("name", TRANSPORTS)
def test_load_from_a_publisher_killed_between_two_handoffs(spawn: Spawn, name: str) -> None:
    child = spawn("publisher", name)
    told = json.loads(child.line())
    reader = HandoffReader(
        identity=rank_identity("decode"),
        transports={name: TRANSPORTS[name]()},
        policy=POLICY.model_copy(update={"transports": [name]}),
        secret=SECRET,
    )
    endpoint = Endpoint(0, 1, local_host_id(), {name: told["address"]})
    for layer in range(LAYERS):
        child.publish(layer)
    arguments = {"first_token": 0, "end_token": 40, "sink": RecordingSink()}
    reader.load("0" * 32, told["ticket"], [endpoint], **arguments)  # type: ignore[arg-type]
    child.signal(signal.SIGKILL)
    with pytest.raises(TransportError, match=r"cannot connect|lost|closed"):
        reader.load("0" * 32, told["ticket"], [endpoint], **arguments)  # type: ignore[arg-type]
    reader.close()


@pytest.mark.parametrize("step", ["claimed", "reading", "read"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_killed_reader_fails_its_handoff_at_once(spawn: Spawn, name: str, step: str) -> None:
    world = World({name: TRANSPORTS[name]()}, policy=quick_policy(lease_s=30))
    opened = world.open()
    child = spawn("reader", name, world.listeners[0].address, opened.ticket, step)
    assert child.line() == step
    child.close()
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
    assert world.store.arena.used_bytes == 0
    world.close()


@pytest.mark.parametrize("step", ["claimed", "read"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_stopped_reader_loses_its_handoff_to_the_lease(spawn: Spawn, name: str, step: str) -> None:
    world = World({name: TRANSPORTS[name]()}, policy=quick_policy(lease_s=1.5))
    opened = world.open()
    child = spawn("reader", name, world.listeners[0].address, opened.ticket, step)
    assert child.line() == step
    child.signal(signal.SIGSTOP)
    wait_until(lambda: world.outcomes() == {"expired": 1}, "the end of the lease")
    assert world.store.arena.used_bytes == 0
    child.close()
    world.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_reader_killed_after_its_end_harms_nothing(spawn: Spawn, name: str) -> None:
    world = World({name: TRANSPORTS[name]()})
    opened = world.open()
    child = spawn("reader", name, world.listeners[0].address, opened.ticket, "ended")
    assert child.line() == "ended"
    child.close()
    assert world.outcomes() == {"consumed": 1}
    world.close()
