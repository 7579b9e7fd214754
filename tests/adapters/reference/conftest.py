"""A generated model, and engines over it that are closed at the end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from disagg_reference.engine import Engine, EngineOptions
from disagg_reference.request import Output, Request
from disagg_reference.tiny import make_tiny

torch.set_num_threads(1)
NUMBERS = itertools.count(1)
WAIT_S = 30.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny")


class Asked:
    """One request and what came of it."""

    def __init__(self, engine: Engine, prompt: tuple[int, ...], max_tokens: int, **more: Any):
        self.outputs: list[Output] = []
        self._over = threading.Event()
        self.request = Request(next(NUMBERS), prompt, max_tokens, tell=self._tell, **more)
        engine.submit(self.request)

    def _tell(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._over.set()

    @property
    def tokens(self) -> list[int]:
        """All tokens, when it is over."""
        assert self._over.wait(WAIT_S), "the request is not over"
        return [output.token for output in self.outputs if output.token is not None]

    @property
    def finish_reason(self) -> str | None:
        assert self._over.wait(WAIT_S), "the request is not over"
        return self.outputs[-1].finish_reason


@pytest.fixture
def make_engine(model: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*, start: bool = True, host: Any = None, before_step: Any = None, **options: Any):
        options = {"model": model, "block_size_tokens": 8, "num_blocks": 128} | options
        engine = Engine(EngineOptions(**options), make_host=host, before_step=before_step)
        engines.append(engine)
        if start:
            engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def ask() -> Callable[..., Asked]:
    return Asked
