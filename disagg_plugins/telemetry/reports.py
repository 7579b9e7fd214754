"""What workers tell the gateway of handoffs: signed JSON over HTTP.

A report is one flat JSON object with ``kind`` (``published``, ``loaded``, ``failed``, ``ended`` or
``hello``) and ``worker``; all but ``hello`` name their ``handoff_id``. The header
``X-Disagg-Signature: t=<unix seconds>,v1=<hexadecimal HMAC-SHA256 of t, ".", body>`` proves the
fleet's secret. A report is news, never a command: a lost one costs a field of a record.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import logging
import queue
import threading
import time
from urllib.parse import urlsplit

import msgspec

from disagg_plugins.errors import AuthenticationError, ConfigError, RemoteProtocolError
from disagg_plugins.handoff.keys import Purpose, derive_key

log = logging.getLogger(__name__)

PATH = "/internal/reports"
SIGNATURE_HEADER = "X-Disagg-Signature"

MAX_AGE_S = 60.0
"""A signature older or newer than this is refused; hosts' clocks agree better than that."""

MAX_BODY_BYTES = 256 * 1024
MAX_REPORTS = 512
MAX_QUEUED = 4096
"""Reports a worker holds while the gateway is away: about 1 MiB."""

SEND_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 3.0
HELLO_EVERY_S = 10.0
"""How often a worker introduces itself again: a gateway may start after it, or start anew."""

HELLO_AGAIN_S = 1.0
"""How soon after nobody was there to hear it: `disagg up` starts workers before the gateway."""

GATHER_S = 0.01
"""Reports that come within this time travel together."""

KINDS = frozenset({"published", "loaded", "failed", "ended", "hello"})

Report = dict[str, object]


def report_key(secret: bytes) -> bytes:
    """Return the key that signs reports."""
    return derive_key(secret, Purpose.REPORT)


def sign(key: bytes, body: bytes, now_s: float) -> str:
    """Return the value of the signature header for ``body``."""
    stamp = str(int(now_s))
    return f"t={stamp},v1={_mac(key, stamp, body)}"


def _mac(key: bytes, stamp: str, body: bytes) -> str:
    return hmac.new(key, stamp.encode("ascii") + b"." + body, hashlib.sha256).hexdigest()


def verify(key: bytes, header: str, body: bytes, now_s: float) -> None:
    """Check the signature header of ``body``.

    Raises:
        AuthenticationError: It is missing, malformed, false or stale.
    """
    stamp, _, proof = header.partition(",v1=")
    stamp = stamp.removeprefix("t=")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12 and len(proof) == 64):
        raise AuthenticationError("the signature is missing or malformed")
    if not hmac.compare_digest(_mac(key, stamp, body).encode(), proof.encode()):
        raise AuthenticationError("the signature is false: another secret is in use there")
    if abs(now_s - int(stamp)) > MAX_AGE_S:
        raise AuthenticationError(
            f"this was signed {now_s - int(stamp):.0f} s ago, at most {MAX_AGE_S:.0f} s are "
            "allowed: compare the hosts' clocks"
        )


def read_reports(body: bytes) -> list[Report]:
    """Return the reports of a verified body.

    Raises:
        RemoteProtocolError: It is not a list of at most 512 reports of known kinds.
    """
    try:
        reports = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"reports are not JSON: {exc}") from exc
    if not isinstance(reports, list) or len(reports) > MAX_REPORTS:
        raise RemoteProtocolError(f"reports are not a list of at most {MAX_REPORTS}")
    for report in reports:
        if not isinstance(report, dict) or report.get("kind") not in KINDS:
            raise RemoteProtocolError("a report is not an object of a known kind")
        if not isinstance(report.get("worker"), str):
            raise RemoteProtocolError("a report names no worker")
        if report["kind"] != "hello" and not isinstance(report.get("handoff_id"), str):
            raise RemoteProtocolError("a report names no handoff")
    return reports


class Reporter:
    """The worker's side: takes reports from any thread and never blocks or raises.

    One daemon thread sends them, a few together; what does not fit the queue or cannot be
    delivered is dropped and counted.

    Args:
        url: The gateway, ``http://host:port``.
        secret: The fleet's secret.
        worker: This worker's name in the policy.
        hello_every_s: How often the latest ``hello`` is sent again.

    Raises:
        ConfigError: The URL is not of that form, or the secret is too short.
    """

    def __init__(
        self, url: str, secret: bytes, worker: str, *, hello_every_s: float = HELLO_EVERY_S
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise ConfigError(f"{url!r} is not of the form http://host:port", key="gateway")
        self._host, self._port = parts.hostname, parts.port
        self._key = report_key(secret)
        self._worker = worker
        self._queue: queue.Queue[Report | None] = queue.Queue(MAX_QUEUED)
        self._connection: http.client.HTTPConnection | None = None
        self._closing = threading.Event()
        self._hello_every_s = hello_every_s
        self._hello: Report | None = None
        self._hello_due_s = 0.0
        self.sent = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="disagg-reporter", daemon=True)
        self._thread.start()

    def send(self, report: Report) -> None:
        """Queue one report; returns at once.

        The latest ``hello`` is sent again every ``hello_every_s``, sooner where nobody heard it.
        """
        if self._closing.is_set():
            self.dropped += 1
            return
        report = {"worker": self._worker, **report}
        if report.get("kind") == "hello":
            self._hello_due_s = time.monotonic() + self._hello_every_s
            self._hello = report
        try:
            self._queue.put_nowait(report)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Send what is queued, within a bound, and end the thread; idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            batch = self._gather()
            now_s = time.monotonic()
            if not batch and self._hello is not None and now_s >= self._hello_due_s:
                self._hello_due_s = now_s + self._hello_every_s
                self._deliver([self._hello], again=True)
            if batch:
                self._deliver(batch)
            if self._closing.is_set() and self._queue.empty():
                self._disconnect()
                return

    def _gather(self) -> list[Report]:
        try:
            first = self._queue.get(timeout=min(HELLO_AGAIN_S, self._hello_every_s))
        except queue.Empty:
            return []
        batch = [] if first is None else [first]
        end_s = time.monotonic() + GATHER_S
        while len(batch) < MAX_REPORTS // 8 and first is not None:
            try:
                more = self._queue.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                break
            batch.append(more)
        return batch

    def _deliver(self, batch: list[Report], *, again: bool = False) -> None:
        # Reports come from an engine: whatever goes wrong here must stay here.
        try:
            body = msgspec.json.encode(batch)
            headers = {
                SIGNATURE_HEADER: sign(self._key, body, time.time()),
                "Content-Type": "application/json",
            }
            status = self._post(body, headers)
        except Exception as exc:
            self._disconnect()
            if not again:  # what is said again and again is not lost
                self._lost(batch, f"{type(exc).__name__}: {exc}")
            if isinstance(exc, OSError | http.client.HTTPException):
                soon_s = time.monotonic() + HELLO_AGAIN_S
                self._hello_due_s = min(self._hello_due_s, soon_s)
            return
        if status == 204:
            self.sent += len(batch)
        else:
            self._lost(batch, f"the gateway answered {status}")

    def _lost(self, batch: list[Report], why: str) -> None:
        if self.dropped == 0:
            log.warning("reports to the gateway %s:%d are lost: %s", self._host, self._port, why)
        self.dropped += len(batch)

    def _post(self, body: bytes, headers: dict[str, str]) -> int:
        """Post once, and once more on a fresh connection when a kept one had been closed."""
        kept = self._connection is not None
        try:
            return self._post_once(body, headers)
        except (http.client.HTTPException, ConnectionError):
            self._disconnect()
            if not kept:
                raise
            return self._post_once(body, headers)

    def _post_once(self, body: bytes, headers: dict[str, str]) -> int:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(
                self._host, self._port, timeout=SEND_TIMEOUT_S
            )
        self._connection.request("POST", PATH, body, headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
