"""A gateway on a loop of its own thread, fake engines behind it, plain sockets before it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.gateway.app import serve
from disagg_plugins.gateway.endpoints import status_of
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.telemetry.reports import Reporter
from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine
from disagg_vllm.dialect import VllmDialect

if TYPE_CHECKING:
    from contextlib import ExitStack

    from disagg_plugins.gateway.server import Gateway

SECRET = b"0123456789abcdef0123456789abcdef"
DEADLINE_S = 10.0
LONG = "word " * 300
SHORT = "hello"


def eventually(check: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until ``check`` is true; fail with ``what`` after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not check():
        if time.monotonic() > end_s:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.005)


def free_port() -> int:
    """Return a port below the range from which the kernel takes those of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class VllmPlugin:
    @hookimpl
    def disagg_register_dialects(self) -> list[VllmDialect]:
        return [VllmDialect()]


class Stack:
    """A running gateway and its engines."""

    def __init__(self, policy: Policy, records: Path, dialects: object | None = None) -> None:
        self.policy = policy
        self.records_path = records
        self.port = policy.gateway.port
        self.engines: dict[str, FakeEngine] = {}
        self.gateway: Gateway
        self._sockets: list[socket.socket] = []
        self._plugin = dialects or VllmPlugin()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._main, name="gateway")
        self._ready = threading.Event()
        self.error: BaseException | None = None

    def _main(self) -> None:
        import uvloop

        try:
            uvloop.run(self._serve())
        except BaseException as exc:  # shown by start() and stop()
            self.error = exc
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def ready(gateway: Gateway) -> None:
            self.gateway = gateway
            self._ready.set()

        with PluginHost.load(
            self.policy.plugins, entry_points=False, extra=[("fake_vllm", self._plugin)]
        ) as host:
            await serve(
                self.policy,
                host,
                secret=SECRET,
                records_path=self.records_path,
                ready=ready,
                stop=self._stop,
            )

    def start(self) -> Stack:
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return self

    def request_stop(self) -> None:
        """Ask for the shutdown that a signal would ask for."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        for sock in self._sockets:
            sock.close()
        if self._thread.is_alive():
            self.request_stop()
            self._thread.join(DEADLINE_S)
            if self._thread.is_alive():
                left = [repr(task) for task in asyncio.all_tasks(self._loop)]
                frame = sys._current_frames().get(self._thread.ident or 0)
                where = "".join(traceback.format_stack(frame))
                pytest.fail(f"the gateway did not end: {left}\n{where}")
        if self.error is not None:
            raise self.error

    def wait_healthy(self, *names: str) -> None:
        states = self.gateway.fleet.states
        for name in names or tuple(self.engines):
            eventually(lambda name=name: states[name].healthy, f"{name} is healthy")

    # Requests

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = DEADLINE_S,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw, headers or {})
            # closed explicitly: an answer that breaks off keeps the socket open otherwise
            with closing(connection.getresponse()) as answer:
                lowered = {k.lower(): v for k, v in answer.getheaders()}
                return answer.status, lowered, answer.read()
        finally:
            connection.close()

    def complete(
        self, prompt: object = LONG, *, stream: bool = False, **more: object
    ) -> tuple[int, bytes]:
        body = {"model": "fake-model", "prompt": prompt, "stream": stream, "max_tokens": 4, **more}
        status, _, answer = self.request("POST", "/v1/completions", body)
        return status, answer

    def raw(self, data: bytes = b"") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        self._sockets.append(sock)
        sock.sendall(data)
        return sock

    def call(self, do: Callable[[], object]) -> None:
        """Do something on the gateway's loop."""
        self._loop.call_soon_threadsafe(do)

    # Looking inside

    def status(self) -> dict[str, object]:
        """Return the gateway's own view of itself, taken on its loop."""
        future = asyncio.run_coroutine_threadsafe(self._status(), self._loop)
        return future.result(DEADLINE_S)

    async def _status(self) -> dict[str, object]:
        return status_of(self.gateway)

    def records(self, count: int) -> list[dict[str, object]]:
        def lines() -> list[str]:
            if not self.records_path.exists():
                return []
            text = self.records_path.read_text()
            return text[: text.rfind("\n") + 1].splitlines()  # the last one may be half written

        eventually(lambda: len(lines()) >= count, f"{count} records")
        return [json.loads(line) for line in lines()]

    def metric(self, name: str, labels: tuple[str, ...] | None = None) -> float:
        return self.gateway.metrics.value(name, labels)

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        gateway = self.gateway
        return (
            not gateway.active
            and not gateway.entrance
            and all(p.counts()["busy"] == 0 for p in gateway.pools.values())
            and all(s.requests == 0 for s in gateway.fleet.states.values())
            and all(s.prompt_tokens == 0 for s in gateway.fleet.states.values())
        )

    def wait_idle(self) -> None:
        eventually(self.idle, f"idle, but {list(self.gateway.pools.values())}")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def build_stack(
    stack: ExitStack,
    folder: Path,
    *,
    gateway: dict[str, object] | None = None,
    telemetry: dict[str, object] | None = None,
    min_prompt_tokens: int = 50,
    behaviours: dict[str, Behaviour] | None = None,
    models: dict[str, str] | None = None,
    reports: bool = False,
    absent: tuple[str, ...] = (),
    wait: bool = True,
    dialects: object | None = None,
    model: str | None = None,
    port_of: dict[str, int] | None = None,
    fleet: dict[str, object] | None = None,
    scheduler: dict[str, object] | None = None,
    worker: dict[str, object] | None = None,
    kv_events: dict[str, str] | None = None,
    **roles: str,
) -> Stack:
    """Start engines and a gateway before them: ``p0="prefill", d0="decode"``."""
    roles = roles or {"p0": "prefill", "d0": "decode"}
    port = free_port()
    engines: dict[str, FakeEngine] = {}
    workers: list[dict[str, object]] = []
    for name, role in roles.items():
        engine = FakeEngine(
            model=(models or {}).get(name, "fake-model"),
            behaviour=(behaviours or {}).get(name),
            secret=SECRET,
            port=(port_of or {}).get(name) or (free_port() if name in absent else 0),
        )
        if name not in absent:
            stack.enter_context(engine)
        if reports:
            engine.reporter = Reporter(f"http://127.0.0.1:{port}", SECRET, name)
            stack.callback(engine.reporter.close)
        engines[name] = engine
        workers.append(
            {"name": name, "url": engine.url, "role": role, "capacity": 1000, **(worker or {})}
        )
        if name in (kv_events or {}):
            workers[-1]["kv_events"] = kv_events[name]
    policy = Policy.model_validate(
        {
            "model": model,
            "fleet": {"workers": workers, **(fleet or {})},
            "scheduler": {
                "split": {"min_prompt_tokens": min_prompt_tokens},
                **(scheduler or {}),
            },
            "gateway": {
                "port": port,
                "probe_s": 0.1,
                "drain_s": 2.0,
                "probe_generate_s": None,
                **(gateway or {}),
            },
            "telemetry": {"report_wait_s": 0.2, **(telemetry or {})},
        }
    )
    running = Stack(policy, folder / "records.jsonl", dialects)
    running.engines = engines
    stack.callback(running.stop)
    running.start()
    if wait:
        running.wait_healthy(*(n for n in roles if n not in absent))
    return running
