"""Strikes are counted, and a pause of the machine now and then is forgiven."""

from __future__ import annotations

import inspect
import threading

import pytest

from disagg_plugins.hook_calls import FORGIVEN_AFTER_CALLS, HookCalls, Implementation
from disagg_plugins.plugin_threads import PluginThread

LONG_S = 10.0


class Slow:
    """A hook that hangs until told, whenever it is asked to."""

    def __init__(self):
        self.hang = False
        self.gate = threading.Event()

    def __call__(self):
        if self.hang:
            self.gate.wait(LONG_S)
        return 1


@pytest.fixture
def slow():
    slow = Slow()
    yield slow
    slow.gate.set()


@pytest.fixture
def calls(slow):
    thread = PluginThread("mine")
    implementation = Implementation("mine", "hook", slow, (), thread)
    yield HookCalls({"hook": [implementation]}, deadline_s=0.5, strikes=2)
    slow.gate.set()
    assert thread.close(LONG_S)


def ask(calls):
    return calls.first("hook", lambda answer: answer, {})


def overrun(calls, slow):
    """Overrun once, then wait until the plugin answers again or is switched off."""
    slow.hang = True
    assert ask(calls) is None
    slow.hang = False
    slow.gate.set()
    pause = threading.Event()
    while ask(calls) is None and not calls.switched_off:
        pause.wait(0.002)
    slow.gate.clear()


def test_strikes_add_up(calls, slow):
    overrun(calls, slow)
    assert calls.switched_off == {}
    overrun(calls, slow)
    assert list(calls.switched_off) == ["mine"]
    assert ask(calls) is None


def test_many_calls_in_time_forgive_a_strike(calls, slow):
    overrun(calls, slow)
    for _ in range(FORGIVEN_AFTER_CALLS):
        ask(calls)
    overrun(calls, slow)
    assert calls.switched_off == {}


def test_the_latest_errors_are_kept_and_all_are_counted(calls):
    def wrong():
        raise ValueError("no")

    calls = HookCalls(
        {"hook": [Implementation("mine", "hook", wrong, (), None)]}, deadline_s=1, strikes=1
    )
    for _ in range(100):
        ask(calls)
    assert len(calls.errors) == 64
    assert calls.counts == {("mine", "hook", "raised"): 100}


def test_the_first_answer_is_not_that_of_a_plugin_left_out():
    told = [Implementation(name, "hook", lambda n=name: n, (), None) for name in ("a", "b")]
    calls = HookCalls({"hook": told}, deadline_s=1.0, strikes=1)
    assert calls.first("hook", str, {}) == ("a", "a")
    assert calls.first("hook", str, {}, without={"a"}) == ("b", "b")
    assert calls.first("hook", str, {}, without={"a", "b"}) is None


@pytest.mark.parametrize("ask_how", ["first", "every"])
def test_a_coroutine_that_a_trusted_plugin_answers_is_closed(ask_how):
    answered = []

    async def wrong():
        """Never runs."""

    def hook():
        answered.append(wrong())
        return answered[0]

    calls = HookCalls(
        {"hook": [Implementation("mine", "hook", hook, (), None)]}, deadline_s=1, strikes=1
    )
    assert not getattr(calls, ask_how)("hook", str, {})
    assert inspect.getcoroutinestate(answered[0]) == inspect.CORO_CLOSED
    assert calls.counts == {("mine", "hook", "nonsense"): 1}
