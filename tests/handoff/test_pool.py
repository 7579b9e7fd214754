"""Idle channels: kept, looked at, bounded, closed."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_plugins.handoff.pool import ChannelPool


@dataclass
class FakeChannel:
    reusable: bool = True
    closed: bool = False

    def close(self) -> None:
        self.closed = True


KEY = ("tcp", "a:1")


def make(now_s: list[float], **arguments: int) -> ChannelPool:
    return ChannelPool(idle_s=10, clock=lambda: now_s[0], **arguments)


def test_last_used_is_lent_first_and_only_to_its_address() -> None:
    pool, a, b = make([0]), FakeChannel(), FakeChannel()
    pool.give(KEY, a)  # type: ignore[arg-type]
    pool.give(KEY, b)  # type: ignore[arg-type]
    assert pool.take(("tcp", "b:1")) is None
    assert [pool.take(KEY), pool.take(KEY), pool.take(KEY)] == [b, a, None]


def test_dead_channels_are_closed_not_lent() -> None:
    pool, dead = make([0]), FakeChannel(reusable=False)
    pool.give(KEY, dead)  # type: ignore[arg-type]
    assert pool.take(KEY) is None
    assert dead.closed


def test_idle_too_long() -> None:
    now_s, old = [0.0], FakeChannel()
    pool = make(now_s)
    pool.give(KEY, old)  # type: ignore[arg-type]
    now_s[0] = 10.1
    assert pool.take(KEY) is None
    assert old.closed


def test_bounded() -> None:
    pool, channels = make([0], max_idle=2), [FakeChannel() for _ in range(3)]
    for channel in channels:
        pool.give(KEY, channel)  # type: ignore[arg-type]
    assert len(pool) == 2
    assert [c.closed for c in channels] == [True, False, False]


def test_closed_pool_keeps_nothing() -> None:
    pool, before, after = make([0]), FakeChannel(), FakeChannel()
    pool.give(KEY, before)  # type: ignore[arg-type]
    pool.close()
    pool.give(KEY, after)  # type: ignore[arg-type]
    assert before.closed
    assert after.closed
