"""Publishing a request's pages chunk by chunk, and giving it up at any moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from disagg_plugins.errors import HandoffAborted, LocalProtocolError
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_plugins.handoff.publications import Publication, PublicationStore
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.tickets import Ticket, new_handoff_id
from disagg_plugins.testing.handoffs import (
    LAYERS,
    SECRET,
    WAIT_S,
    quick_policy,
    rank_identity,
    wait_until,
)
from disagg_sglang.publishing import PagePublisher

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_TOKENS = 90
PAGES = np.array([7, 3, 9, 1, 4, 8], dtype=np.int64)
"""Pages of a prompt of 90 tokens, wherever the engine put them."""

STAGING_WAIT_S = 30.0
ROW_BYTES = rank_identity("x").layout.row_bytes


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakePool:
    """Pages of random bytes; ``before`` is called with the layer before each gather."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.pages = random.integers(0, 256, (LAYERS, 16, ROW_BYTES), dtype=np.uint8)
        self.before: Callable[[int], object] = lambda layer: None

    def gather(self, layer: int, page_ids: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        self.before(layer)
        out[:] = self.pages[layer, page_ids]


class Stepped(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.waiting.append(lambda: fn(*args, **kwargs))
        return Future()

    def step(self) -> None:
        self.waiting.pop(0)()

    def run(self) -> None:
        while self.waiting:
            self.step()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def copier() -> Stepped:
    return Stepped()


@pytest.fixture
def store(clock: Clock) -> Iterator[PublicationStore]:
    policy = quick_policy()
    store = PublicationStore(
        identity=rank_identity("prefill", order="cthd"),
        arena=StagingArena(policy.staging_bytes),
        policy=policy,
        secret=SECRET,
        clock=clock,
        sweeper=False,
    )
    yield store
    store.close()


Make = Callable[..., PagePublisher]


@pytest.fixture
def make(store: PublicationStore, pool: FakePool, copier: Stepped, clock: Clock) -> Make:
    def make(num_tokens: int = NUM_TOKENS, copier: Executor = copier) -> PagePublisher:
        return PagePublisher(
            ticket(),
            range(num_tokens),
            store=store,
            pool=pool,
            copier=copier,
            staging_wait_s=STAGING_WAIT_S,
            clock=clock,
        )

    return make


def ticket(valid_s: float = 60) -> Ticket:
    now_s = time.time()
    return Ticket(new_handoff_id(), "p", "d", now_s, now_s + valid_s)


def opened(publisher: PagePublisher, store: PublicationStore) -> Publication:
    assert publisher.poll() == "open"
    publication = publisher._publication
    assert publication is not None
    return publication


def readable(publication: Publication) -> list[int]:
    """Return the readable blocks of each layer."""
    blocks = range(1, publication.num_blocks + 1)
    return [
        sum(publication.wait_ready(layer, end, 0) > 0 for end in blocks) for layer in range(LAYERS)
    ]


def staged(store: PublicationStore, publication: Publication, layer: int) -> NDArray[np.uint8]:
    view = store.arena.view(
        publication.row_offset(layer, 0), publication.num_blocks * publication._row_bytes
    )
    return view.reshape(publication.num_blocks, -1)


# Staging -----------------------------------------------------------------------------------


def test_a_request_is_open_when_there_is_staging(make: Make, store: PublicationStore) -> None:
    publisher = make()
    assert publisher.state == "waiting"
    publication = opened(publisher, store)
    assert publication.num_tokens == NUM_TOKENS
    assert publication.prompt == prompt_digest(range(NUM_TOKENS))
    assert publisher.num_pages == len(PAGES)


def test_a_request_waits_for_staging_and_opens_later(
    make: Make, store: PublicationStore, clock: Clock
) -> None:
    first, second = make(2700), make()
    taken = opened(first, store)
    clock.now_s += STAGING_WAIT_S - 1
    assert second.poll() == second.poll() == "waiting"
    taken.abort("make room")
    assert second.poll() == "open"


def test_a_request_fails_when_staging_stays_full(
    make: Make, store: PublicationStore, clock: Clock
) -> None:
    first, second = make(2700), make()
    opened(first, store)
    assert second.poll() == "waiting"
    clock.now_s += STAGING_WAIT_S
    assert second.poll() == "failed"
    assert "staging_bytes" in second.reason
    assert second.failed


def test_a_handoff_that_was_published_before_fails_at_once(
    make: Make, store: PublicationStore
) -> None:
    first, second = make(), make()
    second._ticket = first._ticket
    opened(first, store)
    assert second.poll() == "failed"
    assert "opened before" in second.reason


def test_a_request_given_up_while_it_waits_takes_no_staging(
    make: Make, store: PublicationStore
) -> None:
    publisher = make()
    publisher.abort("the client left")
    assert publisher.poll() == "failed"
    assert publisher.reason == "the client left"
    assert store.arena.used_bytes == 0


# Chunks ------------------------------------------------------------------------------------


def test_chunks_become_readable_in_order(
    make: Make, store: PublicationStore, pool: FakePool, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES[:2])
    publisher.send(PAGES[2:5])
    assert readable(publication) == [0, 0, 0]
    copier.step()
    assert readable(publication) == [2, 2, 2]
    copier.step()
    assert readable(publication) == [5, 5, 5]
    assert publisher.poll() == "open"
    publisher.send(PAGES[5:], b"result")
    assert publisher.poll() == "copying"
    copier.step()
    assert readable(publication) == [6, 6, 6]
    assert publisher.poll() == "done"
    for layer in range(LAYERS):
        assert (staged(store, publication, layer) == pool.pages[layer, PAGES]).all()


def test_pages_of_a_chunk_are_copied_before_the_next_layer_is_readable(
    make: Make, store: PublicationStore, pool: FakePool, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    seen: list[list[int]] = []
    pool.before = lambda layer: seen.append(readable(publication))
    publisher.send(PAGES[:2])
    copier.run()
    assert seen == [[0, 0, 0], [2, 0, 0], [2, 2, 0]]


def test_the_result_is_there_before_the_last_row(
    make: Make, store: PublicationStore, copier: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    results: list[bytes] = []
    publish = publication.publish
    monkeypatch.setattr(
        publication,
        "publish",
        lambda *args: (results.append(publication.result), publish(*args)),
    )
    publisher.send(PAGES[:5])
    copier.run()
    publisher.send(PAGES[5:], b"result")
    copier.run()
    assert results == [b""] * LAYERS + [b"result"] * LAYERS


def test_what_was_staged_is_counted(
    make: Make, store: PublicationStore, copier: Stepped, clock: Clock
) -> None:
    publisher = make()
    opened(publisher, store)
    publisher.send(PAGES[:5])
    copier.run()
    assert publisher.seconds is None
    clock.now_s += 0.5
    publisher.send(PAGES[5:], b"result")
    copier.run()
    assert publisher.seconds == 0.5
    assert publisher.payload_bytes == store.identity.layout.staged_bytes(NUM_TOKENS)


def test_more_pages_than_the_prompt_has_are_refused(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES[:5])
    with pytest.raises(LocalProtocolError, match=r"pages \[5, 7\) of a prompt of 6 pages"):
        publisher.send(PAGES[:2], b"result")
    copier.run()
    assert readable(publication) == [5, 5, 5]


def test_the_last_pages_without_a_result_are_refused(make: Make, store: PublicationStore) -> None:
    publisher = make()
    opened(publisher, store)
    with pytest.raises(LocalProtocolError, match="without a result"):
        publisher.send(PAGES)


def test_pages_sent_before_staging_or_after_the_end_are_dropped(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publisher.send(PAGES)
    opened(publisher, store)
    publisher.abort("the client left")
    publisher.send(PAGES, b"result")
    copier.run()
    assert store.stats().published_bytes == 0


# Giving up ---------------------------------------------------------------------------------


def test_nothing_copied_after_an_abort_is_published_and_staging_is_kept_until_the_copy_ends(
    make: Make, store: PublicationStore, pool: FakePool
) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def before(layer: int) -> None:
        if layer == 1:
            copying.set()
            go_on.wait(WAIT_S)

    pool.before = before
    with ThreadPoolExecutor(1) as copier:
        publisher = make(copier=copier)
        publication = opened(publisher, store)
        publisher.send(PAGES, b"result")
        assert copying.wait(WAIT_S)
        publisher.abort("SGLang aborted the prefill")
        pool.pages[:] = 0
        assert publisher.poll() == "failed"
        with pytest.raises(HandoffAborted, match="SGLang aborted the prefill"):
            store.claim(publication.handoff_id, 0, 1)
        other = opened(make(), store)
        assert other.offset >= publication.offset + store.identity.layout.staged_bytes(NUM_TOKENS)
        published, held = store.stats().published_bytes, store.arena.used_bytes
        go_on.set()
        wait_until(lambda: store.arena.used_bytes == held // 2, "the end of the copy")
    assert store.stats().published_bytes == published == len(PAGES) * ROW_BYTES
    assert publisher.payload_bytes == published
    assert publisher.poll() == "failed"


def test_chunks_that_wait_for_their_turn_are_not_copied_after_an_abort(
    make: Make, store: PublicationStore, pool: FakePool, copier: Stepped
) -> None:
    publisher = make()
    opened(publisher, store)
    gathered: list[int] = []
    pool.before = gathered.append
    publisher.send(PAGES[:2])
    publisher.send(PAGES[2:], b"result")
    publisher.abort("SGLang aborted the prefill")
    assert store.arena.used_bytes
    copier.run()
    assert not gathered
    assert store.arena.used_bytes == 0


def test_a_reader_that_waits_is_told_of_an_abort(make: Make, store: PublicationStore) -> None:
    publisher = make()
    publication = opened(publisher, store)
    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(publication.wait_ready, 0, 1, WAIT_S)
        publisher.abort("SGLang aborted the prefill")
        with pytest.raises(HandoffAborted, match="SGLang aborted the prefill"):
            reading.result(WAIT_S)


def test_the_first_reason_of_an_abort_stays(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    opened(publisher, store)
    publisher.abort("first")
    publisher.abort("second")
    copier.run()
    assert publisher.reason == "first"
    assert store.stats().outcomes == {"failed": 1}
    assert store.arena.used_bytes == 0


def test_an_abort_after_the_end_changes_nothing(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES, b"result")
    copier.run()
    publisher.abort("another rank failed")
    copier.run()
    assert publisher.poll() == "done"
    assert publisher.reason == ""
    assert readable(publication) == [6, 6, 6]
    assert store.claim(publication.handoff_id, 0, 1) is publication


def test_an_abort_is_possible_when_copies_are_over(make: Make, store: PublicationStore) -> None:
    copier = ThreadPoolExecutor(1)
    publisher = make(copier=copier)
    opened(publisher, store)
    copier.shutdown()
    publisher.abort("the role is switched")
    assert publisher.poll() == "failed"
    assert store.arena.used_bytes == 0


def test_a_copy_that_raises_fails_the_request_and_is_told(
    make: Make,
    store: PublicationStore,
    pool: FakePool,
    copier: Stepped,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def before(layer: int) -> None:
        raise IndexError("no such page")

    pool.before = before
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES, b"result")
    copier.run()
    assert publisher.poll() == "failed"
    assert publisher.reason == "copying KV failed: IndexError: no such page"
    with pytest.raises(HandoffAborted, match="no such page"):
        store.find(publication.handoff_id)
    assert store.arena.used_bytes == 0
    assert "copying KV failed" in caplog.text


# The peer ----------------------------------------------------------------------------------


def test_a_reader_that_fails_early_fails_the_request(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES[:2])
    store.claim(publication.handoff_id, 0, 1)
    store.failed(publication, "the sink is full")
    assert publisher.poll() == "failed"
    assert publisher.reason == "the handoff ended early: the sink is full"
    copier.run()
    assert store.arena.used_bytes == 0


def test_a_reader_that_fails_after_the_end_changes_nothing(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES, b"result")
    copier.run()
    store.failed(publication, "the sink is full")
    assert publisher.poll() == "done"
    assert store.arena.used_bytes == 0


def test_a_reader_faster_than_the_last_copys_end_fails_nothing(
    make: Make, store: PublicationStore, copier: Stepped, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    store.claim(publication.handoff_id, 0, 1)
    publish = publication.publish

    def read_at_once(layer: int, end_block: int) -> None:
        publish(layer, end_block)
        if publication.complete:
            store.consumed(publication, 0)
            assert publisher.poll() == "copying"

    monkeypatch.setattr(publication, "publish", read_at_once)
    publisher.send(PAGES, b"result")
    copier.run()
    assert publisher.poll() == "done", publisher.reason
    assert store.stats().outcomes == {"consumed": 1}


def test_polling_keeps_the_lease_alive_while_prefill_computes(
    make: Make, store: PublicationStore, clock: Clock
) -> None:
    publisher = make()
    opened(publisher, store)
    for _ in range(3):
        clock.now_s += store.policy.lease_s - 0.1
        assert publisher.poll() == "open"
        assert store.sweep() == 0


def test_a_request_that_nobody_polls_expires(
    make: Make, store: PublicationStore, clock: Clock, copier: Stepped
) -> None:
    publisher = make()
    opened(publisher, store)
    clock.now_s += store.policy.lease_s
    assert store.sweep() == 1
    assert publisher.poll() == "failed"
    assert "lease_s" in publisher.reason
    copier.run()
    assert store.arena.used_bytes == 0


class Event:
    """A point of a device's work; ``reached`` is called when somebody waits for it."""

    def __init__(self, reached: Callable[[], object]) -> None:
        self.synchronize = reached


def test_pages_that_a_forward_pass_still_writes_are_copied_after_it(
    make: Make, store: PublicationStore, copier: Stepped, pool: FakePool
) -> None:
    publisher = make()
    publication = opened(publisher, store)

    def write() -> None:
        pool.pages[:] = 7

    publisher.send(PAGES[:2], written=Event(write))
    assert not (pool.pages == 7).all(), "the scheduler's thread does not wait"
    copier.run()
    for layer in range(LAYERS):
        assert (publication.rows(layer)[:2] == 7).all()


def test_an_event_that_fails_fails_the_request(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    opened(publisher, store)

    def broken() -> None:
        raise RuntimeError("the device is lost")

    publisher.send(PAGES[:2], written=Event(broken))
    copier.run()
    assert publisher.poll() == "failed"
    assert "device is lost" in publisher.reason


def test_a_rank_whose_heads_are_read_elsewhere_goes_on(
    make: Make, store: PublicationStore, copier: Stepped
) -> None:
    publisher = make()
    publication = opened(publisher, store)
    publisher.send(PAGES[:2])
    copier.run()
    store.claim(publication.handoff_id, 0, 1)
    assert store.consumed(publication, 0)  # needs nothing of this rank, and says so at once
    assert publisher.poll() == "open"
    publisher.send(PAGES[2:], b"result")
    copier.run()
    assert publisher.poll() == "done"
    assert store.arena.used_bytes == 0
