"""Two engines that host the connector pair, with KV that can be foretold."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from disagg_plugins import plugins
from disagg_plugins.handoff.endpoints import to_json
from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_plugins.plugin_loading import entry_point_candidates
from disagg_reference.engine import Engine, EngineOptions
from disagg_reference.request import Output, Request
from disagg_reference.tiny import TinyShape, make_tiny
from disagg_reference.trtllm.host import TrtllmHost, llm_args
from disagg_reference.trtllm.interface import Era, installed
from tests.adapters.trtllm.deterministic import DeterministicModel, WatchedHost

torch.set_num_threads(1)

SECRET = "0123456789abcdef0123456789abcdef"
MODULE = "disagg_trtllm.connector"
WAIT_S = 20.0
NUMBERS = itertools.count(1)
PROMPTS = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def _installed_plugins() -> Iterator[None]:
    """Look at what is installed once, and not for each rank of each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "entry_point_candidates", functools.cache(entry_point_candidates))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", TinyShape(num_kv_heads=4))


def prompt(length: int) -> tuple[int, ...]:
    """Return a prompt that no other test has had: what is not loaded is not there by luck."""
    seed = next(PROMPTS)
    return tuple((seed * 7919 + i * i * 31 + i) % 256 for i in range(length))


class Asked:
    """One request of an engine."""

    def __init__(
        self, side: Side, given: tuple[int, ...], max_tokens: int, request_id: int
    ) -> None:
        self.outputs: list[Output] = []
        self._over = threading.Event()
        self.request = Request(request_id, given, max_tokens, tell=self._tell)
        self._side = side
        side.engine.submit(self.request)

    def _tell(self, output: Output) -> None:
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._over.set()

    @property
    def tokens(self) -> list[int]:
        """All tokens; raises what ended the engine."""
        assert self._over.wait(WAIT_S), "the request is not over"
        if self.outputs[-1].finish_reason == "error":
            raise AssertionError(self.outputs[-1].problem)
        return [output.token for output in self.outputs if output.token is not None]


class Side:
    """One engine with the connector pair."""

    engine: Engine
    host: TrtllmHost

    def __init__(self, name: str) -> None:
        self.name = name
        self.reports: list[dict[str, Any]] = []

    @property
    def scheduler(self) -> Any:
        return self.host.scheduler

    @property
    def workers(self) -> list[Any]:
        return [rank.worker for rank in self.host._ranks]

    def announce(self, said: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Tell the connector of a handoff, as the gateway does."""
        host, _, port = self.scheduler._announcements.address.rpartition(":")
        connection = HTTPConnection(host, int(port), timeout=WAIT_S)
        try:
            connection.request("POST", "/announce", json.dumps(said))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def ask(self, given: tuple[int, ...], max_tokens: int = 8, request_id: int = 0) -> Asked:
        return Asked(self, given, max_tokens, request_id or next(NUMBERS))

    @property
    def endpoints(self) -> list[dict[str, Any]]:
        return to_json([worker.side._rank.endpoint for worker in self.workers])

    @property
    def used_bytes(self) -> int:
        """Staging in use on this side."""
        stores = sum(w.side._rank.store.stats().used_bytes for w in self.workers)
        return stores + self.scheduler._fetcher.used_bytes

    def wait_empty(self) -> None:
        end_s = time.monotonic() + WAIT_S
        while self.used_bytes or self.scheduler.side.jobs or self.engine.stats()["blocks_used"]:
            assert time.monotonic() < end_s, (
                f"{self.used_bytes} bytes, {self.scheduler.side.jobs} jobs are left"
            )
            time.sleep(0.005)


class Pair:
    """A prefill and a decode engine."""

    def __init__(self, prefill: Side, decode: Side) -> None:
        self.prefill, self.decode = prefill, decode

    def number(self) -> int:
        return (1 << 40) + next(NUMBERS)

    def ticket(self) -> str:
        return mint(
            SECRET.encode(),
            handoff_id=new_handoff_id(),
            prefill="prefill",
            decode="decode",
            now_s=time.time(),
            valid_s=60.0,
        )

    def publish(self, given: tuple[int, ...], number: int, ticket: str) -> None:
        said = {"version": 1, "step": "prefill", "request_id": number, "ticket": ticket}
        assert self.prefill.announce(said) == (200, {})
        assert len(self.prefill.ask(given, 1, number).tokens) == 1

    def announcement(self, given: tuple[int, ...], number: int, ticket: str) -> dict[str, Any]:
        return {
            "version": 1, "step": "decode", "request_id": number, "ticket": ticket,
            "num_tokens": len(given), "prompt": "", "endpoints": self.prefill.endpoints,
        }  # fmt: skip

    def fetch(self, given: tuple[int, ...], number: int, ticket: str, **more: Any):
        return self.decode.announce({**self.announcement(given, number, ticket), **more})

    def hand_over(self, given: tuple[int, ...], max_tokens: int = 8) -> Asked:
        """Do all of a handoff."""
        number, ticket = self.number(), self.ticket()
        self.publish(given, number, ticket)
        assert self.fetch(given, number, ticket) == (200, {})
        return self.decode.ask(given, max_tokens, number)


Build = Callable[..., Pair]


@pytest.fixture
def pair(
    model: Path, tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Build]:
    """Return what builds two engines; ``change`` may alter the connector's classes first.

    With ``weights`` they compute the generated model, and their KV is what it makes.
    """
    monkeypatch.setenv("DISAGG_SECRET", SECRET)
    monkeypatch.setenv("DISAGG_POLICY", str(tmp_path / "disagg.yaml"))
    with ExitStack() as stack:

        def build(
            *,
            era: Era = "main",
            loads: str = "sync",
            ranks: tuple[int, int] = (1, 1),
            change: Callable[[Any], None] | None = None,
            handoff: dict[str, Any] | None = None,
            weights: bool = False,
            prefill: dict[str, Any] | None = None,
            decode: dict[str, Any] | None = None,
            **host: Any,
        ) -> Pair:
            monkeypatch.setenv("DISAGG_TRTLLM_LOADS", loads)
            workers = [
                {
                    "name": name,
                    "engine": "trtllm",
                    "url": f"http://127.0.0.1:{port}",
                    "role": "both",
                }
                for name, port in (("prefill", 1), ("decode", 2))
            ]
            policy = {
                "fleet": {"workers": workers},
                "gateway": {"port": free_port()},
                "handoff": {"load_s": 5.0, "lease_s": 5.0, **(handoff or {})},
            }
            (tmp_path / "disagg.yaml").write_text(yaml.safe_dump(policy))
            sides = []
            for name, tp_size, options in zip(
                ("prefill", "decode"), ranks, (prefill or {}, decode or {}), strict=True
            ):
                monkeypatch.setenv("DISAGG_WORKER", name)
                side = Side(name)
                _start(side, model, tp_size, era, change, options, host, weights=weights)
                stack.callback(side.engine.close)
                sides.append(side)
            return Pair(*sides)

        yield build


def _start(
    side: Side,
    model: Path,
    tp_size: int,
    era: Era,
    change: Callable[[Any], None] | None,
    options: dict[str, Any],
    more: dict[str, Any],
    *,
    weights: bool,
) -> None:
    models: list[DeterministicModel] = []

    def make_model(config, pools):
        models.append(DeterministicModel(config, pools))
        return models[0]

    def make_host(pools, config):
        with installed(era, MODULE):
            module = importlib.import_module(MODULE)
            if change is not None:
                change(module)
            side.host = TrtllmHost(
                pools,
                llm_args(pools, model),
                module.DisaggKvConnectorScheduler,
                module.DisaggKvConnectorWorker,
                era=era,
                **more,
            )
        side.scheduler.side._report = side.reports.append
        return side.host if weights else WatchedHost(side.host, models)

    engine_options = {"block_size_tokens": 8, "num_blocks": 96} | options
    side.engine = Engine(
        EngineOptions(model=model, tp_size=tp_size, **engine_options),
        make_host=make_host,
        make_model=None if weights else make_model,
    )
    side.engine.start()
