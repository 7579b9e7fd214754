"""Starting and ending: wrong configurations are told, shutdown lets requests end."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.app import serve
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import SECRET, SHORT, Stack, VllmPlugin, eventually, free_port

Build = Callable[..., Stack]


def start(policy: Policy, *, dialect: bool = True, records: Path | None = None) -> None:
    """Start a gateway that is stopped at once."""

    async def main() -> None:
        stop = asyncio.Event()
        stop.set()
        await serve(policy, host, secret=SECRET, records_path=records, stop=stop)

    extra = [("vllm", VllmPlugin())] if dialect else []
    with PluginHost.load(policy.plugins, entry_points=False, extra=extra) as host:
        asyncio.run(main())


def policy_on(port: int) -> Policy:
    worker = {"name": "d0", "url": f"http://127.0.0.1:{free_port()}", "role": "decode"}
    return Policy.model_validate({"fleet": {"workers": [worker]}, "gateway": {"port": port}})


def test_port_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            start(policy_on(port))


def test_engine_without_dialect_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="'vllm'"):
        start(policy_on(free_port()), dialect=False)


def test_a_canary_that_would_get_no_traffic_is_refused_at_the_start() -> None:
    canary = {"candidate": "split.yaml", "store": {"path": "rollout.db"}}
    policy = Policy.model_validate({**policy_on(free_port()).model_dump(), "canary": canary})
    with pytest.raises(ConfigError, match="canary"):
        start(policy)


def test_records_that_cannot_be_written_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write records"):
        start(policy_on(free_port()), records=tmp_path / "file" / "records.jsonl")


def test_start_and_stop_leave_no_task_and_free_the_port(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(3):
        start(policy_on(port), records=tmp_path / "records.jsonl")
    assert threading.active_count() < 10


def test_shutdown_lets_an_open_stream_end_and_takes_no_new_request(build: Build) -> None:
    stack = build(d0="decode", behaviours={"d0": Behaviour(chunk_s=0.05, tokens=10)})
    body = b'{"model":"fake-model","prompt":"x","stream":true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    with closing(http.client.HTTPResponse(sock)) as answer:
        answer.begin()
        first = answer.read1(10)
        assert first
        idle = stack.raw()
        eventually(lambda: len(stack.gateway.connections) == 2, "a second client is connected")
        stack.request_stop()
        eventually(lambda: stack.gateway.draining, "the gateway drains")
        assert idle.recv(10) == b""
        assert (first + answer.read()).endswith(b"data: [DONE]\n\n")
    sock.close()
    stack.stop()


def test_shutdown_cuts_what_does_not_end_in_time(build: Build) -> None:
    stack = build(d0="decode", gateway={"drain_s": 0.2}, behaviours={"d0": Behaviour(hang="head")})
    body = b'{"model":"fake-model","prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    eventually(lambda: len(stack.gateway.active) == 1, "the request runs")
    stack.request_stop()
    with closing(http.client.HTTPResponse(sock)) as answer:
        answer.begin()
        assert answer.status == 503
        assert b"shutting_down" in answer.read()
    stack.stop()
    assert not stack.gateway.active
    (record,) = stack.records(1)
    assert record["outcome"] == "closed"


def test_shutdown_tells_a_stream_that_does_not_end_in_time(build: Build) -> None:
    stack = build(
        d0="decode", gateway={"drain_s": 0.2}, behaviours={"d0": Behaviour(hang="stream")}
    )
    body = b'{"model":"fake-model","prompt":"x","stream":true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    with closing(http.client.HTTPResponse(sock)) as answer:
        answer.begin()
        first = answer.read1(10)
        stack.request_stop()
        with pytest.raises(http.client.IncompleteRead) as broken:
            answer.read()
    assert b"shutting_down" in first + broken.value.partial
    stack.stop()


def test_a_task_that_loses_its_cancellation_does_not_hold_up_the_end(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    stack = build(d0="decode")

    async def deaf() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(3600)

    def spawn() -> None:
        stack.gateway.pools["d0"]._spawn(deaf())

    stack.call(spawn)
    stack.stop()
    assert "cancelled again" in caplog.text


def test_a_plugin_that_raises_loses_no_request(build: Build) -> None:
    from disagg_plugins import hookimpl

    class Bad(VllmPlugin):
        @hookimpl
        def disagg_select_split(self, profile: object, fleet: object) -> None:
            raise RuntimeError("on purpose")

        @hookimpl
        def disagg_on_request_end(self, record: object) -> None:
            raise RuntimeError("on purpose")

    stack = build(dialects=Bad())
    assert stack.complete()[0] == 200
    assert stack.complete(SHORT)[0] == 200
    stack.records(2)
    shown = stack.request("GET", "/metrics")[2]
    assert b'disagg_plugin_failures_total{plugin="fake_vllm"}' in shown
