"""What the pretend engine leaves behind."""

from __future__ import annotations

import gc
import socket
import sys
import time

import pytest

from disagg_plugins.testing.fake_engine import FakeEngine


@pytest.mark.parametrize("turns", range(5))
def test_connections_that_come_as_it_ends_are_closed(monkeypatch, turns) -> None:
    """They are accepted, and lack a transport for some turns of the loop."""
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: left.append(u.exc_value))
    engine = FakeEngine()
    engine.start()
    loop, stop = engine._loop, engine._stop
    assert loop is not None
    assert stop is not None

    def end_after(number: int) -> None:
        if number:
            loop.call_soon(end_after, number - 1)
        else:
            stop.set()

    loop.call_soon_threadsafe(time.sleep, 0.02)
    sockets = [socket.create_connection(("127.0.0.1", engine.port)) for _ in range(5)]
    loop.call_soon_threadsafe(end_after, turns)
    engine.stop()
    for sock in sockets:
        sock.close()
    del engine
    gc.collect()
    assert left == []
