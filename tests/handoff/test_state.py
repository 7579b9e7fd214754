"""The table, and a store driven through random orders of events."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from disagg_plugins.errors import HandoffAborted, LocalProtocolError, StagingFull
from disagg_plugins.handoff.interfaces import Outcome
from disagg_plugins.handoff.publications import Publication, PublicationStore
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.state import TABLE, Event, HandoffState, State
from disagg_plugins.handoff.tickets import Ticket, new_handoff_id
from disagg_plugins.testing.handoffs import LAYERS, SECRET, quick_policy, rank_identity


def make(readers: int = 1) -> HandoffState:
    return HandoffState(
        "h", lease_s=10, now_s=0, readers_of=lambda size: frozenset(range(min(size, readers)))
    )


def test_every_state_but_the_last_can_fail_and_expire() -> None:
    for state, moves in TABLE.items():
        if state is State.ENDED:
            assert not moves
        else:
            assert moves[Event.FAIL] is moves[Event.EXPIRE] is State.ENDED


def test_straight_way() -> None:
    state = make()
    state.written(1)
    state.claim(0, 1, 2)
    assert state.consumed(0, 3)
    assert (state.state, state.outcome, state.releasable) == (State.ENDED, Outcome.CONSUMED, True)


def test_claim_before_everything_is_written() -> None:
    state = make()
    state.claim(0, 1, 1)
    assert state.state is State.CLAIMED_EARLY
    state.written(2)
    assert state.state is State.CLAIMED


def test_memory_is_held_until_the_writer_lets_go() -> None:
    state = make()
    assert state.expire(10)
    assert not state.releasable
    state.writer_gone("late")
    assert state.releasable
    assert state.outcome is Outcome.EXPIRED


def test_every_sign_of_life_renews_the_lease() -> None:
    state = make()
    state.renew(9)
    assert not state.expire(18.9)
    state.claim(0, 1, 18)
    assert not state.expire(27)
    assert state.expire(28)


def test_consumed_only_when_all_readers_are_done() -> None:
    state = make(readers=2)
    state.claim(0, 2, 0)
    state.claim(1, 2, 0)
    state.consumed(0, 0)
    assert not state.ended
    assert not state.peer_gone(0)
    state.consumed(1, 0)
    assert state.outcome is Outcome.CONSUMED


def test_one_reader_that_fails_ends_it_for_all() -> None:
    state = make(readers=2)
    state.claim(0, 2, 0)
    state.claim(1, 2, 0)
    assert state.peer_gone(1)
    assert not state.consumed(0, 0)
    assert state.outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("claims", "refused", "match"),
    [
        ([(0, 2)], (0, 2), "already claimed"),
        ([(0, 2)], (1, 3), "2 decode ranks before, now for 3"),
        ([], (5, 6), "needs nothing"),
    ],
)
def test_refused_claims_change_nothing(
    claims: list[tuple[int, int]], refused: tuple[int, int], match: str
) -> None:
    state = make(readers=2)
    for claim in claims:
        state.claim(*claim, 0)
    before = repr(state)
    with pytest.raises(HandoffAborted, match=match):
        state.claim(*refused, 0)
    assert repr(state) == before


class AnyOrder(RuleBasedStateMachine):
    """Random events on a store: each handoff ends once and frees exactly what it took."""

    handoffs = Bundle("handoffs")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.ends: Counter[str] = Counter()
        self.opened: list[Publication] = []
        self.policy = quick_policy(lease_s=10)
        self.closed = False
        self.store = PublicationStore(
            identity=rank_identity("prefill"),
            arena=StagingArena(self.policy.staging_bytes),
            policy=self.policy,
            secret=SECRET,
            clock=lambda: self.now_s,
            wall_clock=lambda: self.now_s,
            on_event=self._count,
            sweeper=False,
        )

    def _count(self, event: object) -> None:
        if event.step in list(Outcome):  # type: ignore[attr-defined]
            self.ends[event.handoff_id] += 1  # type: ignore[attr-defined]

    @rule(target=handoffs, tokens=st.integers(1, 400))
    def open(self, tokens: int) -> Publication | None:
        ticket = Ticket(new_handoff_id(), "p", "d", self.now_s, self.now_s + 1e6)
        try:
            publication = self.store.open(ticket, tokens)
        except (StagingFull, LocalProtocolError):
            return None
        self.opened.append(publication)
        return publication

    @rule(handoff=handoffs, layer=st.integers(0, LAYERS - 1), part=st.floats(0, 1))
    def publish(self, handoff: Publication | None, layer: int, part: float) -> None:
        if handoff is not None:
            with contextlib.suppress(LocalProtocolError):
                handoff.publish(layer, round(part * handoff.num_blocks))

    @rule(handoff=handoffs)
    def publish_all(self, handoff: Publication | None) -> None:
        if handoff is not None:
            for layer in range(LAYERS):
                with contextlib.suppress(LocalProtocolError):
                    handoff.publish(layer, handoff.num_blocks)

    @rule(handoff=handoffs, rank=st.integers(0, 2), size=st.integers(1, 2))
    def claim(self, handoff: Publication | None, rank: int, size: int) -> None:
        if handoff is not None:
            with contextlib.suppress(HandoffAborted):
                self.store.claim(handoff.handoff_id, rank, size)

    @rule(handoff=handoffs, layer=st.integers(0, LAYERS - 1))
    def read(self, handoff: Publication | None, layer: int) -> None:
        if handoff is not None:
            with contextlib.suppress(HandoffAborted):
                handoff.wait_ready(layer, handoff.num_blocks, 0)

    @rule(handoff=handoffs, rank=st.integers(0, 1))
    def end(self, handoff: Publication | None, rank: int) -> None:
        if handoff is not None:
            with contextlib.suppress(LocalProtocolError):
                self.store.consumed(handoff, rank)

    @rule(handoff=handoffs, rank=st.integers(0, 1))
    def peer_gone(self, handoff: Publication | None, rank: int) -> None:
        if handoff is not None:
            self.store.peer_gone(handoff, rank)

    @rule(handoff=handoffs)
    def reader_fails(self, handoff: Publication | None) -> None:
        if handoff is not None:
            self.store.failed(handoff, "reader")

    @rule(handoff=consumes(handoffs))
    def abort(self, handoff: Publication | None) -> None:
        if handoff is not None:
            handoff.abort("engine")

    @rule(seconds=st.floats(0, 12))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.store.sweep()

    @rule(never=st.integers(0, 30))
    def close(self, never: int) -> None:
        if never == 0:
            self.store.close()
            self.closed = True

    @invariant()
    def arena_holds_exactly_what_is_not_released(self) -> None:
        live = [p for p in self.opened if not p.state.releasable]
        layout = self.store.identity.layout
        wanted = sum(-(-layout.staged_bytes(p.num_tokens) // 4096) * 4096 for p in live)
        assert self.store.arena.used_bytes == wanted
        assert sum(self.store.stats().states.values()) == len(live)

    @invariant()
    def ends_are_told_exactly_once(self) -> None:
        for publication in self.opened:
            assert self.ends[publication.handoff_id] == int(publication.state.ended)

    def teardown(self) -> None:
        for publication in self.opened:
            publication.abort("the test is over")
        assert self.store.arena.used_bytes == 0
        assert set(self.ends.values()) <= {1}
        assert len(self.ends) == len(self.opened)
        assert sum(self.store.stats().outcomes.values()) == len(self.opened)
        self.store.close()


def test_any_order_of_events_ends_once_and_frees_what_it_took() -> None:
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )
