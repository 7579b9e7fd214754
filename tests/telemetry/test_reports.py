"""Signed reports, and the reporter that must never hurt the engine that carries it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from disagg_plugins.errors import AuthenticationError, ConfigError, RemoteProtocolError
from disagg_plugins.telemetry.reports import (
    MAX_QUEUED,
    MAX_REPORTS,
    Reporter,
    read_reports,
    report_key,
    sign,
    verify,
)

SECRET = b"0123456789abcdef0123456789abcdef"
KEY = report_key(SECRET)
BODY = b'[{"kind":"hello","worker":"p0"}]'


def eventually(check: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + 10
    while not check():
        if time.monotonic() > end_s:
            pytest.fail(f"not within 10 s: {what}")
        time.sleep(0.005)


def test_a_signature_verifies() -> None:
    verify(KEY, sign(KEY, BODY, 1000.0), BODY, 1059.0)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "missing or malformed"),
        ("t=1000", "missing or malformed"),
        ("t=x,v1=" + "0" * 64, "missing or malformed"),
        ("t=1000,v1=" + "0" * 64, "false"),
        ("t=\u0661000,v1=" + "0" * 64, "malformed"),
        (sign(report_key(b"another secret of 32 bytes......"), BODY, 1000.0), "false"),
        (sign(KEY, BODY + b" ", 1000.0), "false"),
        (sign(KEY, BODY, 900.0), "100 s ago"),
        (sign(KEY, BODY, 1100.0), "-100 s ago"),
    ],
)
def test_false_and_stale_signatures_are_refused(header: str, says: str) -> None:
    with pytest.raises(AuthenticationError, match=says):
        verify(KEY, header, BODY, 1000.0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b'[{"kind":"hello"}]',
        b'[{"kind":"loaded","worker":"d0"}]',
        b'[{"kind":"rm -rf","worker":"d0","handoff_id":"x"}]',
        json.dumps([{"kind": "hello", "worker": "w"}] * (MAX_REPORTS + 1)).encode(),
    ],
)
def test_malformed_reports_are_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_reports(body)


@contextmanager
def listener(status: int = 204, port: int = 0) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server that verifies and keeps the reports it gets."""
    got: list[dict[str, object]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            verify(KEY, self.headers["X-Disagg-Signature"], body, time.time())
            got.extend(read_reports(body))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", got
        finally:
            server.shutdown()
            thread.join()


def test_reporter_delivers_in_order_and_names_its_worker() -> None:
    with listener() as (url, got):
        reporter = Reporter(url, SECRET, "p0")
        for i in range(100):
            reporter.send({"kind": "published", "handoff_id": str(i), "num_tokens": i})
        reporter.close()
    assert [r["num_tokens"] for r in got] == list(range(100))
    assert {r["worker"] for r in got} == {"p0"}
    assert (reporter.sent, reporter.dropped) == (100, 0)


def test_close_delivers_what_is_queued_and_may_be_repeated() -> None:
    with listener() as (url, got):
        reporter = Reporter(url, SECRET, "p0")
        reporter.send({"kind": "hello"})
        reporter.close()
        reporter.close()
        reporter.send({"kind": "hello"})
    assert len(got) == 1
    assert reporter.dropped == 1


def test_a_worker_introduces_itself_again_to_a_gateway_that_started_later() -> None:
    with listener() as (url, got):
        reporter = Reporter(url, SECRET, "p0", hello_every_s=0.05)
        reporter.send({"kind": "hello", "pid": 7})
        eventually(lambda: len(got) >= 3, "three hellos")
        reporter.close()
    assert {(r["kind"], r["worker"], r["pid"]) for r in got} == {("hello", "p0", 7)}


def test_a_gateway_that_starts_after_its_workers_hears_of_them_within_a_moment(
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    reporter = Reporter(f"http://127.0.0.1:{port}", SECRET, "p0", hello_every_s=600.0)
    reporter.send({"kind": "hello", "pid": 7})
    eventually(lambda: reporter.dropped == 1, "nobody listens")
    with listener(port=port) as (_, got):
        eventually(lambda: got, "a hello")
        reporter.close()
    assert [r["pid"] for r in got] == [7]
    assert reporter.dropped == 1, "what is said again is not lost"


def test_nobody_listens_drops_and_counts() -> None:
    reporter = Reporter("http://127.0.0.1:9", SECRET, "p0")
    reporter.send({"kind": "hello"})
    eventually(lambda: reporter.dropped == 1, "the report is dropped")
    reporter.close()


def test_refused_reports_are_counted_as_dropped() -> None:
    with listener(status=403) as (url, _):
        reporter = Reporter(url, SECRET, "p0")
        reporter.send({"kind": "hello"})
        eventually(lambda: reporter.dropped == 1, "the report is dropped")
        reporter.close()
    assert reporter.sent == 0


def test_report_that_is_no_json_hurts_nobody() -> None:
    with listener() as (url, got):
        reporter = Reporter(url, SECRET, "p0")
        reporter.send({"kind": "hello", "what": threading.Lock()})
        eventually(lambda: reporter.dropped == 1, "the report is dropped")
        reporter.send({"kind": "hello"})
        eventually(lambda: len(got) == 1, "the next one arrives")
        reporter.close()


def test_send_never_blocks_and_the_queue_is_bounded() -> None:
    reporter = Reporter("http://127.0.0.1:9", SECRET, "p0")
    begin_s = time.monotonic()
    for _ in range(3 * MAX_QUEUED):
        reporter.send({"kind": "hello"})
    assert time.monotonic() - begin_s < 5
    reporter.close()
    assert reporter.dropped > 0


@pytest.mark.parametrize("url", ["gateway:8000", "https://x:1", "http://x", ""])
def test_wrong_url_is_a_clear_error(url: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        Reporter(url, SECRET, "p0")
