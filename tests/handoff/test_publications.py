"""Writing, waiting for space, leases and events of the store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.errors import (
    AuthenticationError,
    HandoffAborted,
    LocalProtocolError,
    StagingFull,
)
from disagg_plugins.handoff.messages import MAX_RESULT_BYTES
from disagg_plugins.handoff.publications import Publication, PublicationStore
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.tickets import Ticket, new_handoff_id
from disagg_plugins.testing.handoffs import LAYERS, SECRET, WAIT_S, quick_policy, rank_identity

if TYPE_CHECKING:
    from disagg_plugins.types import HandoffEvent

TOKENS_OF_ALL = 2720
"""170 blocks of 16 tokens, 3 layers of 2 KiB rows: all but a page of the 1 MiB arena."""


@pytest.fixture
def events() -> list[HandoffEvent]:
    return []


@pytest.fixture
def store(events: list[HandoffEvent]) -> Iterator[PublicationStore]:
    policy = quick_policy()
    store = PublicationStore(
        identity=rank_identity("prefill"),
        arena=StagingArena(policy.staging_bytes),
        policy=policy,
        secret=SECRET,
        on_event=events.append,
    )
    yield store
    store.close()


def ticket(handoff_id: str | None = None, valid_s: float = 60) -> Ticket:
    now_s = time.time()
    return Ticket(handoff_id or new_handoff_id(), "p", "d", now_s, now_s + valid_s)


def finish(publication: Publication) -> None:
    for layer in range(LAYERS):
        publication.publish(layer, publication.num_blocks)


def test_steps_are_told_in_order(store: PublicationStore, events: list[HandoffEvent]) -> None:
    publication = store.open(ticket(), 40)
    finish(publication)
    store.claim(publication.handoff_id, 0, 1)
    store.consumed(publication, 0)
    assert [e.step for e in events] == ["opened", "published", "claimed", "consumed"]
    assert store.stats().published_bytes == 3 * 3 * rank_identity("x").layout.row_bytes


def test_late_rows_never_reach_the_memory_of_another_handoff(store: PublicationStore) -> None:
    late = store.open(ticket(), 40)
    view = late.rows(0)
    store.failed(late, "the reader left")
    other = store.open(ticket(), 40)
    other.rows(0)[:] = 1
    view[:] = 9
    late.rows(1)[:] = 9
    assert (other.rows(0) == 1).all()
    finish(late)
    assert store.stats().states == {"open": 1}
    with pytest.raises(LocalProtocolError, match="let go"):
        late.rows(0)
    other.abort("done")
    assert store.arena.used_bytes == 0


def test_full_staging_is_refused_with_numbers(store: PublicationStore) -> None:
    store.open(ticket(), TOKENS_OF_ALL)
    with pytest.raises(StagingFull, match="staging_bytes") as caught:
        store.open(ticket(), 400)
    assert caught.value.retryable
    assert caught.value.bound_bytes == 1 << 20
    assert store.stats().refused_full == 1


def test_waiting_for_staging_ends_when_some_is_freed(store: PublicationStore) -> None:
    first = store.open(ticket(), TOKENS_OF_ALL)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.open, ticket(), 400, wait_s=WAIT_S)
        first.abort("make room")
        waiting.result(WAIT_S).abort("done")


def test_what_can_never_fit_is_not_waited_for(store: PublicationStore) -> None:
    started_s = time.monotonic()
    with pytest.raises(StagingFull):
        store.open(ticket(), 100_000, wait_s=60)
    assert time.monotonic() - started_s < 5


def test_an_id_is_opened_once_even_after_its_end(store: PublicationStore) -> None:
    one = ticket()
    publication = store.open(one, 40)
    with pytest.raises(LocalProtocolError, match="it is open"):
        store.open(one, 40)
    publication.abort("preempted")
    with pytest.raises(LocalProtocolError, match="failed: preempted"):
        store.open(one, 40)
    assert store.arena.used_bytes == 0


def test_expired_ticket_opens_nothing(store: PublicationStore) -> None:
    with pytest.raises(AuthenticationError, match="expired"):
        store.open(ticket(valid_s=-1), 40)
    assert store.arena.used_bytes == 0


def test_a_result_that_no_reader_would_take_is_refused(store: PublicationStore) -> None:
    publication = store.open(ticket(), 40)
    publication.result = bytes(MAX_RESULT_BYTES)
    with pytest.raises(LocalProtocolError, match=f"{MAX_RESULT_BYTES + 1} .*{MAX_RESULT_BYTES} "):
        publication.result = bytes(MAX_RESULT_BYTES + 1)
    assert len(publication.result) == MAX_RESULT_BYTES


@pytest.mark.parametrize(("layer", "end_block"), [(-1, 1), (LAYERS, 1), (0, 4), (0, -1)])
def test_publish_out_of_range(store: PublicationStore, layer: int, end_block: int) -> None:
    publication = store.open(ticket(), 40)
    with pytest.raises(LocalProtocolError, match="outside"):
        publication.publish(layer, end_block)


def test_publish_never_goes_back(store: PublicationStore) -> None:
    publication = store.open(ticket(), 40)
    publication.publish(0, 2)
    with pytest.raises(LocalProtocolError, match="cannot go back to 1"):
        publication.publish(0, 1)


def test_abort_is_idempotent_and_tells_once(
    store: PublicationStore, events: list[HandoffEvent]
) -> None:
    publication = store.open(ticket(), 40)
    publication.abort("first")
    publication.abort("second")
    assert [e.step for e in events] == ["opened", "failed"]
    assert events[-1].detail["problem"] == "first"
    with pytest.raises(HandoffAborted, match="failed: first"):
        store.find(publication.handoff_id)


def test_listener_of_events_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: HandoffEvent) -> None:
        raise ValueError("broken on purpose")

    policy = quick_policy()
    store = PublicationStore(
        identity=rank_identity("prefill"),
        arena=StagingArena(policy.staging_bytes),
        policy=policy,
        secret=SECRET,
        on_event=broken,
    )
    store.open(ticket(), 40).abort("done")
    assert "broken on purpose" in caplog.text
    store.close()


def test_close_ends_everything_and_refuses_more(store: PublicationStore) -> None:
    publication = store.open(ticket(), 40)
    store.close()
    store.close()
    assert publication.outcome == "failed"
    publication.abort("late")
    assert store.arena.used_bytes == 0
    with pytest.raises(LocalProtocolError, match="closed"):
        store.open(ticket(), 40)


def test_packed_layout_needs_a_way_to_unpack() -> None:
    policy = quick_policy()
    with pytest.raises(LocalProtocolError, match="unpack"):
        PublicationStore(
            identity=rank_identity("prefill", packing="amx:1"),
            arena=StagingArena(4096),
            policy=policy,
            secret=SECRET,
        )


def test_the_end_is_told_once_even_when_its_id_was_forgotten_meanwhile(
    store: PublicationStore, events: list[HandoffEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg_plugins.handoff.publications.MAX_REMEMBERED", 2)
    late = store.open(ticket(), 40)
    store.failed(late, "the reader left")
    for _ in range(4):
        store.failed(store.open(ticket(), 16), "one of many")
    finish(late)
    ends = [e.step for e in events if e.handoff_id == late.handoff_id]
    assert ends.count("failed") == 1
