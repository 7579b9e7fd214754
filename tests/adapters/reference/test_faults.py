"""Faults happen when they are asked for by name, and the log says so."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import pytest

from disagg_plugins.errors import ConfigError
from disagg_reference.engine import NoHost
from disagg_reference.faults import Faults, FaultyHost, read_faults

PROMPT = tuple((5 * i * i + i) % 256 for i in range(40))


def test_without_being_asked_nothing_fails(caplog: pytest.LogCaptureFixture) -> None:
    assert read_faults([]) is None
    assert caplog.records == []


def test_what_is_planted_is_named_loudly(caplog: pytest.LogCaptureFixture) -> None:
    asked = ["slow-steps:0.5", "crash-at-step:7", "drop-transfers", "corrupt-blocks:1,2"]
    assert read_faults(asked) == Faults(0.5, 7, True, (1, 2))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(each in record.getMessage() for each in asked)


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "slow-steps",
        "slow-steps:0",
        "slow-steps:x",
        "slow-steps:nan",
        "crash-at-step:0",
        "crash-at-step:1.5",
        "drop-transfers:1",
        "corrupt-blocks:1",
        "corrupt-blocks:1,2,3",
        "corrupt-blocks:-1,0",
        "corrupt-blocks:0,-1",
        "meteor",
    ],
)
def test_an_unknown_fault_is_refused_with_those_that_are_known(asked: str) -> None:
    with pytest.raises(ConfigError, match="is no fault") as raised:
        read_faults([asked])
    assert "crash-at-step:N" in (raised.value.fix or "")


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (3, 1)])
def test_blocks_that_the_model_has_can_be_damaged(layer: int, head: int) -> None:
    Faults(corrupt=(layer, head)).check(num_layers=4, num_kv_heads=2)
    Faults(slow_s=1.0).check(num_layers=4, num_kv_heads=2)


@pytest.mark.parametrize(("layer", "head"), [(4, 0), (0, 2), (99, 99)])
def test_blocks_that_the_model_lacks_are_refused_with_what_it_has(layer: int, head: int) -> None:
    with pytest.raises(ConfigError) as raised:
        Faults(corrupt=(layer, head)).check(num_layers=4, num_kv_heads=2)
    assert f"corrupt-blocks:{layer},{head}: the model has 4 layers and 2 KV heads" in str(
        raised.value
    )
    assert raised.value.fix == "name a layer of 0 to 3 and a head of 0 to 1"


def test_the_crash_comes_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    faults = Faults(crash_at=3)
    for number in (1, 2):
        faults.before_step(number)
    assert killed == []
    faults.before_step(3)
    assert killed == [(os.getpid(), signal.SIGKILL)]


class Brings(NoHost):
    """Says that the first tokens are there: they are, for their blocks hold an earlier request."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.brought = 0

    def match(self, request: Any, computed_tokens: int) -> tuple[int, bool]:
        self.asked.append("match")
        return self.brought, False

    def allocated(self, request: Any, block_ids: Any) -> None:
        self.asked.append("allocated")

    def end(self) -> None:
        self.asked.append("end")


def test_dropped_transfers_reach_nobody_and_the_answer_is_right(make_engine, ask) -> None:
    inner = Brings()
    engine = make_engine(
        host=lambda pools, _: FaultyHost(inner, pools, Faults(drop_transfers=True))
    )
    found = ask(engine, PROMPT, 6).tokens
    assert found == ask(make_engine(), PROMPT, 6).tokens
    assert inner.asked == []


def test_damage_is_done_to_what_was_brought_and_to_nothing_else(make_engine, ask) -> None:
    plain = ask(make_engine(), PROMPT, 6).tokens
    inner, pools = Brings(), []

    def make(given: Any, _: Any) -> FaultyHost:
        pools.extend(given)
        return FaultyHost(inner, given, Faults(corrupt=(1, 0)))

    engine = make_engine(host=make, num_blocks=6)
    assert ask(engine, PROMPT, 6).tokens == plain  # nothing was brought
    before = pools[0].tensor.clone()
    inner.brought = 7  # of a prompt whose first blocks are in the cache
    other = ask(engine, (*PROMPT[:24], *PROMPT[:10]), 1)
    assert other.finish_reason == "length"
    assert (other.request.local_tokens, other.request.matched_tokens) == (24, 7)
    changed = (pools[0].tensor != before).view(6, 2, 2, 2, 8, 16).any(-1).any(-1)
    assert bool(changed[:, 1, 0, 0].any())
    cached = changed[:3].any(0)  # blocks of the beginning, which nobody computes again
    assert cached.nonzero().tolist() == [[1, 0, 0]]
