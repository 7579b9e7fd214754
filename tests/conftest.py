"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import settings

# Machines that run tests are busy: how long an example takes says nothing.
settings.register_profile("unhurried", deadline=None, max_examples=50)
settings.load_profile("unhurried")

# Nothing here multiplies great matrices; threads that wait to, in each of many processes, spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A tenth of the tests' time went into looking for garbage among what stays until the end.
gc.set_threshold(50_000, 20, 100)

LONGEST = (
    "tests/adapters/trtllm/test_contract.py",
    "tests/adapters/trtllm/test_mutants.py",
    "tests/gateway/test_resume.py",
    "tests/cli/test_up.py",
    "tests/gateway/test_openings.py",
    "tests/canary/test_rollouts.py",
    "tests/gateway/test_slow_workers.py",
    "tests/launch/test_local.py",
    "tests/gateway/test_faults.py",
)
"""Files with tests of many seconds: one that came last would be waited for alone."""


@pytest.hookimpl(trylast=True)  # after -m has taken away what is not run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put one of the longest files after the other first in the share of each process."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    longest: list[list[pytest.Item]] = [[] for _ in range(processes)]
    others = []
    for item in items:
        file = item.nodeid.partition("::")[0]
        (longest[LONGEST.index(file) % processes] if file in LONGEST else others).append(item)
    items.clear()
    for number, first in enumerate(longest):  # `--dist worksteal` deals equal shares, in order
        left = processes - number
        share = (sum(map(len, longest[number:])) + len(others)) // left
        rest = max(0, share - len(first)) if left > 1 else len(others)
        items += first + others[:rest]
        del others[:rest]


def pytest_collection_finish() -> None:
    """Let the collector leave alone what stays until the end."""
    gc.freeze()


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
