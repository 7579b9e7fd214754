"""One thread for one plugin: answers, errors, deadlines, and what is left behind."""

from __future__ import annotations

import threading

import pytest

from disagg_plugins.plugin_threads import BusyError, OverranError, PluginThread, RaisedError

LONG_S = 10.0


@pytest.fixture
def thread():
    thread = PluginThread("mine")
    yield thread
    assert thread.close(LONG_S)


def test_returns_what_the_work_returns_even_an_exception_object(thread):
    error = ValueError("a value, not raised")
    assert thread.call(lambda: error, LONG_S) is error
    assert thread.call(threading.current_thread, LONG_S).name == "disagg-plugin-mine"


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), KeyboardInterrupt()])
def test_hands_over_what_the_work_raised_and_lives_on(thread, error):
    def work():
        raise error

    with pytest.raises(RaisedError) as caught:
        thread.call(work, LONG_S)
    assert caught.value.cause is error
    assert thread.call(lambda: 1, LONG_S) == 1


def test_a_late_answer_is_never_given_to_the_next_caller(thread):
    gate, left = threading.Event(), threading.Event()

    def late():
        gate.wait(LONG_S)
        left.set()
        return "late"

    with pytest.raises(OverranError):
        thread.call(late, 0.05)
    with pytest.raises(BusyError, match="has not returned"):
        thread.call(lambda: "next", LONG_S)
    gate.set()
    assert left.wait(LONG_S)
    for _ in range(1000):  # the answer is on its way once the work has left
        try:
            assert thread.call(lambda: "next", LONG_S) == "next"
        except BusyError:
            threading.Event().wait(0.002)
        else:
            return
    pytest.fail("the thread stayed busy")


def test_a_caller_does_not_wait_for_others_longer_than_its_deadline(thread):
    entered, gate = threading.Event(), threading.Event()

    def work():
        entered.set()
        gate.wait(LONG_S)

    other = threading.Thread(target=thread.call, args=(work, LONG_S))
    other.start()
    assert entered.wait(LONG_S)
    with pytest.raises(BusyError, match="other calls kept it busy"):
        thread.call(lambda: 1, 0.05)
    gate.set()
    other.join(LONG_S)
    assert thread.call(lambda: 1, LONG_S) == 1


def test_a_closed_thread_takes_no_calls():
    thread = PluginThread("mine")
    thread.call(lambda: 1, LONG_S)
    assert thread.close(LONG_S)
    assert thread.close(LONG_S)
    with pytest.raises(BusyError, match="closed"):
        thread.call(lambda: 1, LONG_S)
