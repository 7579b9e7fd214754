"""The life of one handoff on the publisher's side, as a table.

Rules; everything that changes the state of a handoff lives in this file:

1. A handoff starts ``OPEN``: its memory is taken, rows are being written.
2. ``WRITTEN`` (every row is readable) leads to ``PUBLISHED``, or to ``CLAIMED`` if it is claimed.
3. A claim is allowed before everything is written (``CLAIMED_EARLY``); reads then wait for rows.
4. Each decode rank that needs rows claims once. The first claim says how many ranks decode; a
   claim that says otherwise, comes twice, or comes from a rank that needs nothing is refused and
   changes nothing.
5. ``CONSUMED`` of the last expected reader ends the handoff as *consumed*. One failure, one lost
   connection of a reader that has claimed and not yet consumed, one abort or the closing of the
   store ends it as *failed* for all readers.
6. The lease starts at ``OPEN`` and is renewed by every sign of life: rows published, a claim, a
   read. When it runs out in any state the handoff ends as *expired*.
7. ``ENDED`` is final. Every handoff ends exactly once; later events change nothing.
8. Its memory is held twice: by the *writer* until everything is written or it lets go, and by
   the *lease* until the end. It is freed exactly once, when both have let go.

Time is a parameter: ``now_s`` on a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from disagg_plugins.errors import HandoffAborted, LocalProtocolError
from disagg_plugins.handoff.interfaces import Outcome


class State(StrEnum):
    """Where a handoff stands."""

    OPEN = "open"
    PUBLISHED = "published"
    CLAIMED_EARLY = "claimed_early"
    CLAIMED = "claimed"
    ENDED = "ended"


class Event(StrEnum):
    """What can happen to a handoff."""

    WRITTEN = "written"
    CLAIM = "claim"
    ALL_CONSUMED = "all_consumed"
    FAIL = "fail"
    EXPIRE = "expire"


TABLE: dict[State, dict[Event, State]] = {
    State.OPEN: {
        Event.WRITTEN: State.PUBLISHED,
        Event.CLAIM: State.CLAIMED_EARLY,
        Event.FAIL: State.ENDED,
        Event.EXPIRE: State.ENDED,
    },
    State.PUBLISHED: {
        Event.CLAIM: State.CLAIMED,
        Event.FAIL: State.ENDED,
        Event.EXPIRE: State.ENDED,
    },
    State.CLAIMED_EARLY: {
        Event.WRITTEN: State.CLAIMED,
        Event.CLAIM: State.CLAIMED_EARLY,
        Event.ALL_CONSUMED: State.ENDED,
        Event.FAIL: State.ENDED,
        Event.EXPIRE: State.ENDED,
    },
    State.CLAIMED: {
        Event.CLAIM: State.CLAIMED,
        Event.ALL_CONSUMED: State.ENDED,
        Event.FAIL: State.ENDED,
        Event.EXPIRE: State.ENDED,
    },
    State.ENDED: {},
}

_OUTCOMES = {
    Event.ALL_CONSUMED: Outcome.CONSUMED,
    Event.FAIL: Outcome.FAILED,
    Event.EXPIRE: Outcome.EXPIRED,
}

ReadersOf = Callable[[int], frozenset[int]]
"""Number of decode ranks -> the ones among them that need this publisher's rows."""


class HandoffState:
    """State, lease and readers of one handoff. Not thread-safe: its owner holds a lock.

    Args:
        handoff_id: Named in errors.
        lease_s: Length of the lease.
        now_s: Monotonic time.
        readers_of: Which decode ranks need the rows, given how many there are.
    """

    def __init__(
        self, handoff_id: str, *, lease_s: float, now_s: float, readers_of: ReadersOf
    ) -> None:
        self.handoff_id = handoff_id
        self.state = State.OPEN
        self.outcome: Outcome | None = None
        self.detail = ""
        self.writer_holds = True
        self.deadline_s = now_s + lease_s
        self._lease_s = lease_s
        self._readers_of = readers_of
        self._decode_size: int | None = None
        self._expected: frozenset[int] = frozenset()
        self._claimed: set[int] = set()
        self._consumed: set[int] = set()

    def __repr__(self) -> str:
        return (
            f"<HandoffState {self.handoff_id} {self.state} outcome={self.outcome} "
            f"writer_holds={self.writer_holds} claimed={sorted(self._claimed)} "
            f"consumed={sorted(self._consumed)} of {sorted(self._expected)}>"
        )

    @property
    def ended(self) -> bool:
        """Whether the handoff has ended."""
        return self.state is State.ENDED

    @property
    def releasable(self) -> bool:
        """Whether both holders have let go of the memory."""
        return self.ended and not self.writer_holds

    def renew(self, now_s: float) -> None:
        """Renew the lease; nothing happens after the end."""
        if not self.ended:
            self.deadline_s = now_s + self._lease_s

    def written(self, now_s: float) -> None:
        """Every row is readable: the writer lets go."""
        if not self.writer_holds:
            raise LocalProtocolError(f"handoff {self.handoff_id}: written twice")
        self.writer_holds = False
        if not self.ended:
            self._move(Event.WRITTEN)
            self.renew(now_s)

    def claim(self, decode_rank: int, decode_size: int, now_s: float) -> None:
        """One decode rank claims.

        Raises:
            HandoffAborted: Ended, claimed twice, or not for this rank; nothing changed.
        """
        if self.ended:
            raise HandoffAborted(self.handoff_id, f"already {self.outcome}: {self.detail}")
        if self._decode_size not in (None, decode_size):
            raise HandoffAborted(
                self.handoff_id,
                f"claimed for {self._decode_size} decode ranks before, now for {decode_size}",
            )
        expected = self._readers_of(decode_size)
        if decode_rank not in expected:
            raise HandoffAborted(
                self.handoff_id,
                f"decode rank {decode_rank} of {decode_size} needs nothing of this prefill rank",
            )
        if decode_rank in self._claimed:
            raise HandoffAborted(self.handoff_id, f"already claimed by decode rank {decode_rank}")
        self._decode_size, self._expected = decode_size, expected
        self._claimed.add(decode_rank)
        self._move(Event.CLAIM)
        self.renew(now_s)

    def consumed(self, decode_rank: int, now_s: float) -> bool:
        """One reader has taken what it needs; return False if the handoff had ended before."""
        if self.ended:
            return False
        if decode_rank not in self._claimed or decode_rank in self._consumed:
            raise LocalProtocolError(
                f"handoff {self.handoff_id}: decode rank {decode_rank} consumed out of turn"
            )
        self._consumed.add(decode_rank)
        self.renew(now_s)
        if self._consumed == self._expected:
            self._move(Event.ALL_CONSUMED, "every reader has taken its rows")
        return True

    def peer_gone(self, decode_rank: int) -> bool:
        """A reader's connection ended; return whether that ended the handoff."""
        if self.ended or decode_rank not in self._claimed or decode_rank in self._consumed:
            return False
        return self.fail(f"the connection of decode rank {decode_rank} ended before its word")

    def fail(self, detail: str) -> bool:
        """End as failed; return whether this call ended it."""
        if self.ended:
            return False
        self._move(Event.FAIL, detail)
        return True

    def expire(self, now_s: float) -> bool:
        """End as expired if the lease has run out; return whether this call ended it."""
        if self.ended or now_s < self.deadline_s:
            return False
        self._move(Event.EXPIRE, f"nothing happened for {self._lease_s:g} s (handoff.lease_s)")
        return True

    def writer_gone(self, detail: str) -> bool:
        """The writer lets go early; return whether that ended the handoff.

        A writer that lets go after everything is written changes nothing about its memory.
        """
        self.writer_holds = False
        return self.fail(detail)

    def _move(self, event: Event, detail: str = "") -> None:
        allowed = TABLE[self.state]
        if event not in allowed:
            raise LocalProtocolError(
                f"handoff {self.handoff_id}: {event} is impossible while {self.state}"
            )
        self.state = allowed[event]
        if self.state is State.ENDED:
            self.outcome = _OUTCOMES[event]
            self.detail = detail
