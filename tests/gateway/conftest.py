"""The fixture that builds a gateway with fake engines; ``harness.py`` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.gateway.harness import Stack, build_stack


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    with ExitStack() as stack:
        yield partial(build_stack, stack, tmp_path)
