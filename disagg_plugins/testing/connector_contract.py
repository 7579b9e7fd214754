"""What every transport must pass. Subclass it in a test module and give it a transport::

class TestMyTransport(ConnectorContract):
    def make_transport(self) -> Transport:
        return MyTransport()

    def raw_connect(self, address: str) -> socket.socket:
        ...  # a plain socket to a listener's address, for strangers and garbage
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.errors import (
    AuthenticationError,
    DisaggError,
    HandoffAborted,
    IncompatiblePeerError,
    LocalProtocolError,
    TransportError,
)
from disagg_plugins.handoff.frames import HEADER_BYTES, FrameType, pack_frame
from disagg_plugins.handoff.interfaces import Channel, Outcome, Transport
from disagg_plugins.handoff.messages import Hello, encode
from disagg_plugins.testing.handoffs import (
    FINGERPRINT,
    HEADS,
    LAYERS,
    SECRET,
    WAIT_S,
    Opened,
    RecordingSink,
    World,
    quick_policy,
    rank_identity,
    wait_until,
)

if TYPE_CHECKING:
    import socket

MakeWorld = Callable[..., World]


class ConnectorContract:
    """Tests of one transport, with a real listener and real channels in one process."""

    def make_transport(self) -> Transport:
        """Return the transport under test."""
        raise NotImplementedError

    def raw_connect(self, address: str) -> socket.socket:
        """Return a plain socket connected to a listener's address."""
        raise NotImplementedError

    @pytest.fixture
    def make_world(self) -> Iterator[MakeWorld]:
        """Make worlds that are closed, and searched for leaks, at the end of the test."""
        worlds: list[World] = []

        def make(**arguments: object) -> World:
            transport = self.make_transport()
            worlds.append(World({transport.name: transport}, **arguments))  # type: ignore[arg-type]
            return worlds[-1]

        yield make
        for world in reversed(worlds):
            world.close()

    @pytest.fixture
    def world(self, make_world: MakeWorld) -> World:
        """A world of one prefill rank."""
        return make_world()

    # What arrives

    @pytest.mark.parametrize(("first", "end"), [(0, 40), (16, 40), (16, 32), (32, 33), (0, 1)])
    def test_equal_layouts_move_whole_rows(self, world: World, first: int, end: int) -> None:
        opened, sink = world.open(), RecordingSink()
        report = world.load(opened, sink, first_token=first, end_token=end)
        blocks = slice(first // 16, -(-end // 16))
        for layer in range(LAYERS):
            assert sink.layer(layer) == opened.rows[0][layer][blocks].tobytes()
        assert (report.form, report.num_tokens) == ("native", end - first)
        assert report.payload_bytes == sum(len(sink.layer(each)) for each in range(LAYERS))
        assert world.outcomes() == {"consumed": 1}
        assert world.store.arena.used_bytes == 0

    @pytest.mark.parametrize("change", [{"block_size_tokens": 8}, {"order": "cthd"}])
    def test_unlike_layouts_move_canonical_tokens(
        self, world: World, change: dict[str, object]
    ) -> None:
        opened, sink = world.open(), RecordingSink()
        reader = world.reader(rank_identity("decode", **change))  # type: ignore[arg-type]
        report = world.load(opened, sink, reader=reader, first_token=5, end_token=39)
        assert report.form == "canonical"
        for layer in range(LAYERS):
            assert sink.layer(layer) == opened.canonical(world.store, 0, layer, 5, 39)

    def test_first_token_inside_a_block_writes_nothing_before_it(self, world: World) -> None:
        opened, sink = world.open(), RecordingSink()
        report = world.load(opened, sink, first_token=5)
        assert (report.form, report.num_tokens) == ("canonical", 35)
        assert sink.layer(1) == opened.canonical(world.store, 0, 1, 5, 40)

    @pytest.mark.parametrize(
        ("prefill_size", "decode_size"), [(2, 1), (1, 2), (2, 2), (8, 1), (4, 8)]
    )
    def test_shards_meet_whatever_the_sizes(
        self, make_world: MakeWorld, prefill_size: int, decode_size: int
    ) -> None:
        world = make_world(prefill_size=prefill_size)
        opened = world.open()
        whole = [self._all_heads(world, opened, layer) for layer in range(LAYERS)]
        for rank in range(decode_size):
            sink = RecordingSink()
            identity = rank_identity("decode", rank, decode_size)
            world.load(opened, sink, reader=world.reader(identity))
            self._check_heads(sink, identity.layout.head_start, whole)
        assert world.outcomes() == {"consumed": prefill_size}

    def test_layers_are_read_while_later_ones_are_computed(self, world: World) -> None:
        opened, sink = world.open(publish=False), RecordingSink()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(world.load, opened, sink)
            for layer in range(LAYERS):
                opened.publish([layer])
                wait_until(partial(sink.has_layers, layer + 1), f"layer {layer}")
            assert loading.result(WAIT_S).num_tokens == 40

    def test_waiting_longer_than_the_silence_bound_is_fine_while_the_engine_works(
        self, make_world: MakeWorld
    ) -> None:
        world = make_world(policy=quick_policy(read_s=0.4, load_s=5.0))
        opened, sink = world.open(publish=False), RecordingSink()
        publication = opened.publications[0]
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(world.load, opened, sink)
            started_s = time.monotonic()
            blocks = iter([(2, 1), (2, 2), (1, 1), (1, 2), (0, 1), (0, 2)])
            pause = threading.Event()
            for layer, end_block in blocks:
                pause.wait(0.15)
                publication.publish(layer, end_block)
            opened.publish()
            loading.result(WAIT_S)
            assert time.monotonic() - started_s > 0.4

    def test_many_loads_at_once(self, world: World) -> None:
        reader = world.reader()
        handoffs = [world.open() for _ in range(12)]
        sinks = [RecordingSink() for _ in handoffs]
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda pair: world.load(*pair, reader=reader), zip(handoffs, sinks, strict=True)
                )
            )
        for opened, sink in zip(handoffs, sinks, strict=True):
            assert sink.layer(2) == opened.rows[0][2].tobytes()

    def test_one_connection_serves_many_handoffs(self, world: World) -> None:
        reader = world.reader()
        for _ in range(5):
            world.load(world.open(), RecordingSink(), reader=reader)
        assert _connections(world) in (1, None)

    # Who may read

    def test_wrong_secret_learns_nothing(self, world: World) -> None:
        opened, sink = world.open(), RecordingSink()
        with pytest.raises(AuthenticationError):
            world.load(
                opened, sink, reader=world.reader(secret=b"another secret of 32 bytes, wrong")
            )
        assert sink.empty
        assert world.outcomes() == {}
        world.load(opened, sink)

    def test_false_and_stale_tickets_are_refused(self, world: World) -> None:
        opened, sink = world.open(), RecordingSink()
        foreign = world.ticket(opened.handoff_id, secret=b"another secret of 32 bytes, wrong")
        stale = world.ticket(opened.handoff_id, valid_s=-1.0)
        for ticket in (foreign, stale, opened.ticket[:-2], "A" * 1024, "no ticket"):
            with pytest.raises(AuthenticationError):
                world.load(opened, sink, ticket=ticket)
        assert sink.empty
        world.load(opened, sink)

    def test_a_ticket_works_once(self, world: World) -> None:
        opened = world.open()
        world.load(opened, RecordingSink())
        with pytest.raises(HandoffAborted, match="already consumed"):
            world.load(opened, RecordingSink())

    def test_unknown_handoff_is_named(self, world: World) -> None:
        opened = replace(world.open(), handoff_id="0" * 32)
        ticket = world.ticket("0" * 32)
        with pytest.raises(HandoffAborted, match="unknown"):
            world.load(opened, RecordingSink(), ticket=ticket)

    def test_another_model_is_refused_before_a_byte(self, world: World) -> None:
        opened, sink = world.open(), RecordingSink()
        other = replace(rank_identity("decode"), fingerprint=replace(FINGERPRINT, model="other"))
        with pytest.raises(IncompatiblePeerError, match=r"model: decode/0 has 'other'.*prefill/0"):
            world.load(opened, sink, reader=world.reader(other))
        assert sink.empty

    # How it ends when something goes wrong

    def test_asking_for_more_than_there_is_fails_on_both_sides(self, world: World) -> None:
        with pytest.raises(HandoffAborted, match="40 tokens, 41"):
            world.load(world.open(), RecordingSink(), end_token=41)
        wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")

    def test_failing_sink_fails_the_handoff(self, world: World) -> None:
        with pytest.raises(RuntimeError, match="on purpose"):
            world.load(world.open(), RecordingSink(fail_at=1))
        wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
        assert world.store.arena.used_bytes == 0

    def test_lost_connection_fails_the_handoff_at_once(self, world: World) -> None:
        opened = world.open(publish=False)
        channel = self._connect(world)
        channel.claim(opened.ticket)
        channel.close()
        wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
        opened.publications[0].abort("the test is over")

    def test_lost_connection_is_noticed_while_rows_are_waited_for(self, world: World) -> None:
        opened = world.open(publish=False)
        channel = self._connect(world)
        channel.claim(opened.ticket)
        rows = channel.read(first_token=0, end_token=40, first_head=0, end_head=HEADS)
        waiting = threading.Thread(target=self._swallow, args=(rows,))
        waiting.start()
        channel.close()
        waiting.join(WAIT_S)
        assert not waiting.is_alive()
        wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
        opened.publications[0].abort("the test is over")

    def test_engine_abort_reaches_a_waiting_reader(self, world: World) -> None:
        opened = world.open(publish=False)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(world.load, opened, RecordingSink())
            wait_until(lambda: world.store.stats().states == {"claimed_early": 1}, "the claim")
            opened.publications[0].abort("preempted")
            with pytest.raises(HandoffAborted, match="preempted"):
                loading.result(WAIT_S)

    def test_engine_that_never_publishes_is_waited_for_in_bounded_time(
        self, make_world: MakeWorld
    ) -> None:
        world = make_world(policy=quick_policy(read_s=0.3))
        opened, started_s = world.open(publish=False), time.monotonic()
        with pytest.raises(HandoffAborted, match="read_s"):
            world.load(opened, RecordingSink())
        assert time.monotonic() - started_s < 2.0
        wait_until(lambda: world.outcomes() == {"failed": 1}, "the failure")
        opened.publications[0].abort("the test is over")

    def test_lease_end_after_reading_voids_what_was_read(self, make_world: MakeWorld) -> None:
        world = make_world(policy=quick_policy(lease_s=0.2))
        opened, channel = world.open(), self._connect(world)
        channel.claim(opened.ticket)
        for _ in channel.read(first_token=0, end_token=40, first_head=0, end_head=HEADS):
            pass
        wait_until(lambda: world.outcomes() == {"expired": 1}, "the end of the lease")
        with pytest.raises((HandoffAborted, TransportError)):
            channel.end(Outcome.CONSUMED)
        channel.close()

    def test_unclaimed_handoff_is_freed_when_its_lease_ends(self, make_world: MakeWorld) -> None:
        world = make_world(policy=quick_policy(lease_s=0.2))
        world.open()
        wait_until(lambda: world.store.arena.used_bytes == 0, "the end of the lease")
        assert world.outcomes() == {"expired": 1}

    def test_nobody_listens(self, world: World) -> None:
        address = world.listeners[0].address
        for listener in world.listeners:
            listener.close()
        transport = self.make_transport()
        with pytest.raises(TransportError):
            transport.connect(address, rank_identity("decode"), secret=SECRET, policy=world.policy)

    @pytest.mark.parametrize("address", ["", "nonsense", "@disagg-kv-x", "host:99999", "x" * 300])
    def test_malformed_address(self, address: str) -> None:
        with pytest.raises(TransportError):
            self.make_transport().connect(
                address, rank_identity("decode"), secret=SECRET, policy=quick_policy()
            )

    def test_close_is_bounded_while_peers_are_connected(self, world: World) -> None:
        opened = world.open(publish=False)
        channel = self._connect(world)
        channel.claim(opened.ticket)
        strangers = [self.raw_connect(world.listeners[0].address) for _ in range(3)]
        started_s = time.monotonic()
        world.listeners[0].close()
        world.listeners[0].close()
        assert time.monotonic() - started_s < 2.0
        channel.close()
        for stranger in strangers:
            stranger.close()
        opened.publications[0].abort("the test is over")

    def test_wrong_order_of_calls_is_our_bug(self, world: World) -> None:
        opened, channel = world.open(), self._connect(world)
        channel.claim(opened.ticket)
        with pytest.raises(LocalProtocolError):
            channel.claim(opened.ticket)
        channel.close()

    # Strangers and garbage

    def test_silent_stranger_is_dropped(self, make_world: MakeWorld) -> None:
        world = make_world(policy=quick_policy(connect_s=0.2))
        with contextlib.closing(self.raw_connect(world.listeners[0].address)) as stranger:
            stranger.settimeout(WAIT_S)
            assert stranger.recv(1) == b""

    def test_strangers_cannot_keep_a_peer_out(self, make_world: MakeWorld) -> None:
        world = make_world(policy=quick_policy(max_connections=4, connect_s=5.0))
        # One less than may be open for the moment in which those that were shut still count.
        strangers = [self.raw_connect(world.listeners[0].address) for _ in range(7)]
        world.load(world.open(), RecordingSink())
        for stranger in strangers:
            stranger.close()

    def test_garbage_neither_crashes_nor_grows(self, make_world: MakeWorld) -> None:
        world = make_world(policy=quick_policy(connect_s=0.3))
        source = random.Random(11)
        address = world.listeners[0].address
        used = world.store.arena.used_bytes
        threads, descriptors = threading.active_count(), _descriptors()
        for round_ in range(60):
            with contextlib.closing(self.raw_connect(address)) as stranger:
                with contextlib.suppress(OSError):
                    stranger.sendall(_garbage(source, round_))
        wait_until(
            lambda: threading.active_count() <= threads and _descriptors() <= descriptors,
            "the end of every stranger's thread and descriptor",
        )
        assert _connections(world) in (0, None)
        assert world.store.arena.used_bytes == used
        world.load(world.open(), RecordingSink())

    def test_a_stranger_hears_only_a_random_number(self, world: World) -> None:
        with contextlib.closing(self.raw_connect(world.listeners[0].address)) as stranger:
            stranger.settimeout(WAIT_S)
            hello = Hello(b"\0" * 32, [1])
            stranger.sendall(pack_frame(FrameType.HELLO, encode(hello)))
            heard = stranger.recv(4096)
            assert heard[3] == FrameType.CHALLENGE
            assert len(heard) < HEADER_BYTES + 64
            assert FINGERPRINT.model.encode() not in heard

    # Helpers

    def _connect(self, world: World) -> Channel:
        transport = next(iter(world.transports.values()))
        return transport.connect(
            world.listeners[0].address,
            rank_identity("decode"),
            secret=SECRET,
            policy=world.policy,
        )

    @staticmethod
    def _swallow(rows: Iterator[object]) -> None:
        with contextlib.suppress(DisaggError):
            for _ in rows:
                pass

    @staticmethod
    def _all_heads(world: World, opened: Opened, layer: int) -> dict[tuple[int, int], bytes]:
        """Return (rank, global head) -> its canonical bytes of all 40 tokens."""
        heads: dict[tuple[int, int], bytes] = {}
        for rank, store in enumerate(world.stores):
            layout = store.identity.layout
            data = opened.canonical(store, rank, layer, 0, 40)
            for local in range(layout.num_kv_heads_local):
                heads.setdefault(
                    (rank, layout.head_start + local),
                    _head(data, local, layout.num_kv_heads_local),
                )
        return heads

    @staticmethod
    def _check_heads(
        sink: RecordingSink, head_start: int, whole: list[dict[tuple[int, int], bytes]]
    ) -> None:
        """Check that every head that arrived is one rank's bytes of that head."""
        if sink.native:
            return
        for (layer, _, first_head), data in sink.canonical.items():
            count = len(data) // (2 * 40 * 8 * 2)
            for local in range(count):
                wanted = [v for (_, head), v in whole[layer].items() if head == first_head + local]
                assert _head(data, local, count) in wanted


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _connections(world: World) -> int | None:
    """Return the connections of the listener, or None where it does not say."""
    return getattr(world.listeners[0], "num_connections", None)


def _head(data: bytes, head: int, heads: int) -> bytes:
    """Cut one head out of canonical bytes ``[2, tokens, heads, 8]`` of two-byte elements."""
    step = 8 * 2
    return b"".join(
        data[at + head * step : at + (head + 1) * step] for at in range(0, len(data), heads * step)
    )


def _garbage(source: random.Random, round_: int) -> bytes:
    """Return noise, a broken header, a huge length, a frame out of order or a cut-off HELLO."""
    hello = pack_frame(FrameType.HELLO, encode(Hello(source.randbytes(32), [1])))
    match round_ % 6:
        case 0:
            return source.randbytes(source.randrange(1, 4096))
        case 1:
            return hello[:8] + (1 << 62).to_bytes(8, "big") + source.randbytes(64)
        case 2:
            return hello[: source.randrange(1, len(hello))]
        case 3:
            return hello + pack_frame(FrameType.CLAIM, source.randbytes(100))
        case 4:
            return hello + pack_frame(FrameType.AUTH, source.randbytes(40))
        case _:
            mutated = bytearray(hello)
            mutated[source.randrange(len(mutated))] ^= 1 << source.randrange(8)
            return bytes(mutated)
