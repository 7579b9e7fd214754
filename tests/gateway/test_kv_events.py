"""Following engines' KV events, over real sockets at the end."""

from __future__ import annotations

import asyncio
import logging

import pytest
import zmq
import zmq.asyncio

from disagg_plugins.gateway import kv_events
from disagg_plugins.gateway.kv_events import KvEvents, Listening
from disagg_plugins.scheduling.kv_blocks import PART_BLOCKS, BlockTree
from disagg_plugins.scheduling.prefix_hashes import PrefixHasher
from disagg_plugins.scheduling.prefix_index import PrefixIndex
from tests.gateway.test_kv_event_messages import AllBlocksCleared, BlockRemoved, message, stored

HASHER = PrefixHasher(b"key")
PROMPT = [n % 7 for n in range(128)]
BLOCKS = [stored(block_hashes=[1, 2], token_ids=PROMPT, block_size=64)]
DEADLINE_S = 20.0


@pytest.fixture
def index():
    return PrefixIndex(1000)


@pytest.fixture
def heard(index):
    return Listening(BlockTree("w", index, HASHER, 1000))


def claimed(index):
    return dict(index.longest(HASHER.of_ids(PROMPT))).get("w", 0)


def test_follows_what_is_stored_and_removed(heard, index):
    heard.hear(message(5, *BLOCKS))
    assert (claimed(index), heard.state) == (2, "listening")
    heard.hear(message(6, BlockRemoved([2], "GPU")))
    assert claimed(index) == 1
    heard.hear(message(7, AllBlocksCleared()))
    assert (claimed(index), heard.clears) == (0, 0)


@pytest.mark.parametrize(
    ("number", "why"), [(7, "batches were lost"), (0, "the engine started anew")]
)
def test_a_gap_or_a_restart_clears_and_knowledge_grows_from_there(
    heard, index, caplog, number, why
):
    heard.hear(message(5, *BLOCKS))
    tail = stored(block_hashes=[9], parent_block_hash=2, token_ids=PROMPT[:64], block_size=64)
    heard.hear(message(number, tail))
    assert (claimed(index), heard.clears) == (0, 1)
    assert why in heard.problem
    heard.hear(message(number + 1, *BLOCKS))
    assert (claimed(index), heard.clears, heard.state) == (2, 1, "listening")
    assert why in caplog.text


def test_a_message_that_cannot_be_followed_clears(heard, index):
    for wrong in ([b"junk"], message(6, stored(token_ids=[1], block_size=64))):
        heard.hear(message(5, *BLOCKS))
        heard.hear(wrong)
        assert (claimed(index), heard.state) == (0, "cleared")
        heard.next = None


def test_a_lost_connection_clears_and_is_told_once(heard, index, caplog):
    caplog.set_level(logging.WARNING, "disagg_plugins")
    for _ in range(3):
        heard.hear(message(5, *BLOCKS))
        heard.lost()
        assert (claimed(index), heard.state) == (0, "waiting")
    assert caplog.text.count("not known any more") == 1
    assert heard.as_dict()["clears"] == 3


@pytest.mark.parametrize("events", [1, 3000])
def test_requests_have_their_turn_while_a_large_message_is_followed(heard, index, events):
    each = 6000 // events
    many = [
        stored(
            block_hashes=list(range(n * each, (n + 1) * each)),
            parent_block_hash=n * each - 1 if n else None,
            token_ids=[7] * (each * 8),
            block_size=8,
        )
        for n in range(events)
    ]
    heard.tree = BlockTree("w", index, HASHER, 10_000)
    sizes = [len(heard.tree) for _ in heard.follow(message(0, *many))]
    steps = [b - a for a, b in zip(sizes, [*sizes[1:], len(heard.tree)], strict=True)]
    assert sum(steps) == 6000
    assert max(steps) <= PART_BLOCKS
    assert heard.state == "listening"


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # it changes on this loop, between messages
            await asyncio.sleep(0.01)


def bind(context, port=0):
    """Return an engine's publisher and its port."""
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.LINGER, 0)
    if port:
        publisher.bind(f"tcp://127.0.0.1:{port}")
        return publisher, port
    return publisher, publisher.bind_to_random_port("tcp://127.0.0.1")


async def follow_a_publisher(index) -> None:
    context = zmq.asyncio.Context()
    publisher, port = bind(context)
    events = KvEvents({"w": f"tcp://127.0.0.1:{port}"}, index, HASHER)
    heard = events.workers["w"]
    task = asyncio.get_running_loop().create_task(events.run())
    try:
        await asyncio.wait_for(publisher.recv(), DEADLINE_S)  # the subscription
        await publisher.send_multipart(message(0, *BLOCKS))
        await until(lambda: claimed(index) == 2)
        assert events.knows("w")
        await publisher.send_multipart(message(2, *BLOCKS))
        await until(lambda: heard.clears == 1 and events.knows("w"))

        publisher.close()
        await until(lambda: heard.state == "waiting")
        assert claimed(index) == 0
        assert not events.knows("w")

        publisher, _ = bind(context, port)
        await asyncio.wait_for(publisher.recv(), DEADLINE_S)
        await publisher.send_multipart(message(0, *BLOCKS))
        await until(lambda: claimed(index) == 2)

        await publisher.send_multipart([b"", b"0" * 8, bytes(kv_events.MAX_MESSAGE_BYTES + 1)])
        await until(lambda: heard.state == "waiting")  # too large: the peer is dropped
        assert claimed(index) == 0
    finally:
        task.cancel()
        await asyncio.wait([task])
        publisher.close()
        context.destroy(linger=0)
    assert task.cancelled()
    assert claimed(index) == 0


def test_a_real_publisher_is_followed_through_gaps_restarts_and_floods(index) -> None:
    import uvloop

    uvloop.run(follow_a_publisher(index))


async def come_and_go(index) -> None:
    context = zmq.asyncio.Context()
    publisher, port = bind(context)
    events = KvEvents({}, index, HASHER)
    task = asyncio.get_running_loop().create_task(events.run())
    try:
        await asyncio.sleep(0)
        for _ in range(2):  # the name may be used again
            events.join("w", f"tcp://127.0.0.1:{port}")
            await asyncio.wait_for(publisher.recv(), DEADLINE_S)  # the subscription
            await publisher.send_multipart(message(0, *BLOCKS))
            await until(lambda: claimed(index) == 2)
            events.leave("w")
            assert (claimed(index), events.knows("w"), events.workers) == (0, False, {})
            await asyncio.wait_for(publisher.recv(), DEADLINE_S)  # the end of the subscription
        await until(lambda: len(asyncio.all_tasks()) == 2)
    finally:
        task.cancel()
        await asyncio.wait([task])
        context.destroy(linger=0)


def test_workers_that_join_are_listened_to_until_they_leave(index) -> None:
    asyncio.run(come_and_go(index))


async def listen_to_many(index, publishers, monkeypatch) -> None:
    """One of them sends what the reader does not expect; the last one is heard all the same."""
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, 10_000)
    publisher, port = bind(context)
    endpoints = {f"w{n}": f"tcp://127.0.0.1:{port}" for n in range(publishers)}
    events = KvEvents(endpoints, index, HASHER)

    def fail(frames) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(kv_events, "AGAIN_S", 0.01)
    task = asyncio.get_running_loop().create_task(events.run())
    try:
        await asyncio.wait_for(publisher.recv(), DEADLINE_S)  # one subscription for all
        broken, last = events.workers["w0"], events.workers[f"w{publishers - 1}"]
        broken.tree.on = fail
        number = 0
        while not (last.batches and broken.problem.endswith("LookupError")):
            await publisher.send_multipart(message(number, AllBlocksCleared()))
            number += 1
            await asyncio.sleep(0.02)
        heard = list(events.workers.values())
        assert not task.done()
        assert [h.problem for h in heard if "failed" in h.problem] == [broken.problem]
        del broken.tree.on
        await until_heard(publisher, broken, number)
    finally:
        task.cancel()
        await asyncio.wait([task])
        publisher.close()
        context.destroy(linger=0)


async def until_heard(publisher, heard, number) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while heard.state != "listening":
            await publisher.send_multipart(message(number, AllBlocksCleared()))
            number += 1
            await asyncio.sleep(0.02)


def test_a_worker_that_cannot_be_followed_takes_nobody_else_with_it(index, monkeypatch) -> None:
    asyncio.run(listen_to_many(index, 2, monkeypatch))


def test_more_workers_are_listened_to_than_zeromq_has_sockets_for_by_itself(
    index, monkeypatch
) -> None:
    asyncio.run(listen_to_many(index, 400, monkeypatch))
