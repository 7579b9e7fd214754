"""Where the gateway tells the adapter of a handoff, before it asks the engine.

One POST of JSON to ``/announce``. The ticket in it is signed with the fleet's secret: who has none
is answered 403 and learns nothing. The answer to an announcement of a decode comes when the KV is
here, or cannot be. ``opening`` asks a prefill worker, once its engine has answered, which tokens it
read and which one it wrote: the gateway sees text only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from disagg_plugins.errors import AuthenticationError, DisaggError, RemoteProtocolError

log = logging.getLogger(__name__)

VERSION = 1
PATH = "/announce"
MAX_BODY_BYTES = 256 << 10
"""Endpoints of 256 ranks, each some hundred bytes."""

MAX_TICKET_CHARS = 1024
MAX_TOKENS = 1 << 26
MAX_ENDPOINTS = 256
SILENCE_S = 10.0
WHOLE_S = 15.0
"""Until an announcement has been said; the gateway needs milliseconds."""

MOST_CONNECTIONS = 64
POLL_S = 0.05
CLOSE_S = 5.0

LEAST_ID = 1 << 40
"""TensorRT-LLM counts its own requests below (``MIN_GLOBAL_ID``)."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is said of one request.

    Attributes:
        request_id: By which the engine will know it.
        step: ``prefill`` (publish it), ``opening`` (tell its tokens) or ``decode`` (fetch it).
        ticket: The gateway's.
        opening: Of a prefill: its tokens will be asked for.
        num_tokens: Of the prompt; 0 but for a decode.
        prompt: Its digest, where the prefill worker's answer told it.
        endpoints: Where the ranks of the prefill worker serve it; empty but for a decode.
    """

    request_id: int
    step: Literal["prefill", "opening", "decode"]
    ticket: str
    opening: bool = False
    num_tokens: int = 0
    prompt: str = ""
    endpoints: tuple[Mapping[str, object], ...] = ()


def read_announcement(body: bytes) -> Announcement:
    """Return what a body says, checked.

    Raises:
        RemoteProtocolError: It breaks the rules.
    """
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise RemoteProtocolError(f"an announcement is no JSON: {exc}") from exc
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise RemoteProtocolError(
            f"an announcement of version {VERSION} is expected: run the same release of "
            "disagg-plugins on the gateway and the workers"
        )
    request_id, step, ticket = said.get("request_id"), said.get("step"), said.get("ticket")
    if type(request_id) is not int or not LEAST_ID <= request_id < 1 << 63:
        raise RemoteProtocolError(f"request_id is {request_id!r:.40}")
    if not isinstance(ticket, str) or not 0 < len(ticket) <= MAX_TICKET_CHARS:
        raise RemoteProtocolError("the ticket is missing, empty or too long")
    if step == "prefill":
        return Announcement(request_id, "prefill", ticket, said.get("opening") is True)
    if step == "opening":
        return Announcement(request_id, "opening", ticket)
    if step != "decode":
        raise RemoteProtocolError(f"step is {step!r:.40}, not prefill, opening or decode")
    tokens, prompt, endpoints = said.get("num_tokens"), said.get("prompt"), said.get("endpoints")
    if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS:
        raise RemoteProtocolError(f"num_tokens is {tokens!r:.40}")
    if not isinstance(prompt, str) or len(prompt) > 64:
        raise RemoteProtocolError("the prompt's digest is missing or too long")
    if (
        not isinstance(endpoints, list)
        or not 0 < len(endpoints) <= MAX_ENDPOINTS
        or not all(isinstance(each, dict) for each in endpoints)
    ):
        raise RemoteProtocolError("endpoints is not a list of 1 to 256 records")
    return Announcement(
        request_id,
        "decode",
        ticket,
        num_tokens=tokens,
        prompt=prompt,
        endpoints=tuple(endpoints),
    )


Take = Callable[[Announcement], Mapping[str, object]]


class Announcements:
    """Listens from threads of its own; close it.

    Args:
        host: Where; loopback unless the policy says otherwise.
        take: Does what is announced; what it returns, or raises, is the answer.
        advertise_host: What the gateway connects to, where that differs.
    """

    def __init__(self, host: str, take: Take, *, advertise_host: str | None = None) -> None:
        self._server = _Server(host, take)
        shown = advertise_host or host
        self.address = f"[{shown}]" if ":" in shown else shown
        self.address += f":{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": POLL_S},
            name="disagg-announcements",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; idempotent, bounded."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(CLOSE_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, host: str, take: Take) -> None:
        self.take = take
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)

    def process_request(self, request: object, client_address: object) -> None:
        """Begin a connection, unless there are too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        try:
            super().process_request(request, client_address)  # type: ignore[arg-type]
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: object, client_address: object) -> None:
        """Serve a connection on its thread."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._slots.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that breaks is no news."""
        log.debug("an announcement's connection broke", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = SILENCE_S

    def handle(self) -> None:
        """Serve one announcement; who takes too long to say it is cut off."""
        self.deadline = threading.Timer(WHOLE_S, self._cut_off)
        self.deadline.daemon = True
        self.deadline.start()
        try:
            super().handle()
        finally:
            self.deadline.cancel()

    def _cut_off(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def version_string(self) -> str:
        """Return what the head of an answer says of this server."""
        return "disagg"

    def do_POST(self) -> None:
        """Take an announcement."""
        self.close_connection = True
        length = self.headers.get("content-length", "")
        if self.path != PATH or not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self._refuse(400, "an announcement of at most 256 KiB is expected")
            return
        try:
            body = self.rfile.read(int(length))
            self.deadline.cancel()  # what is announced has bounds of its own
            answer = self.server.take(read_announcement(body))
        except AuthenticationError:
            self._refuse(403, "the ticket is not good for this worker")
        except RemoteProtocolError as exc:
            self._refuse(400, str(exc))
        except DisaggError as exc:
            self._refuse(409, str(exc))
        except Exception:
            log.exception("an announcement could not be taken")
            self._refuse(500, "the adapter failed; the worker's log says why")
        else:
            self._answer(200, answer)

    def _refuse(self, status: int, problem: str) -> None:
        self._answer(status, {"problem": problem[:500]})

    def _answer(self, status: int, answer: Mapping[str, object]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""
