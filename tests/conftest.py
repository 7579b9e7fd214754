"""Fixtures shared by all tests."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from hypothesis import settings

# Machines that run tests are busy: how long an example takes says nothing.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Return a function that finds a loopback port nobody listens on; no port twice in a test."""
    given: set[int] = set()

    def find() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return find
