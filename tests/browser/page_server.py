"""A server of the canary's page before a document made by hand, which commands change."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from disagg_plugins.canary.page_files import static
from disagg_plugins.canary.pages import FILE_LINES
from tests.canary.hand_made import made_document

PHASES = {"hold": "held", "resume": "running", "approve": "running", "rollback": "aborted"}
MOST_WAIT_S = 20.0


class Site:
    """What the server answers, and what it was asked.

    Attributes:
        gate: A GET of the document waits until it is set.
        waiting: A GET waits there.
        status: Of the document.
    """

    def __init__(self, text: str) -> None:
        self.document: dict[str, Any] = made_document(text)
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()
        self.status = 200
        self.gets = 0
        self.tokens: list[str | None] = []
        self.commands: list[dict[str, str]] = []
        self.url = ""

    def read(self) -> tuple[int, bytes]:
        body = json.dumps(self.document).encode()  # of now, however long it is on its way
        self.gets += 1
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(MOST_WAIT_S)
        return self.status, body if self.status == 200 else b'{"error": {"message": "no"}}'

    def act(self, command: dict[str, str]) -> tuple[int, bytes]:
        self.commands.append(command)
        if not command["why"]:
            return 409, b'{"error": {"message": "say why"}}'
        progress = dict(self.document["progress"], phase=PHASES[command["do"]])
        if command["do"] == "approve":
            progress.update(step=1, weight=25)
        if command["do"] == "rollback":
            progress.update(weight=0)
        weight = progress["weight"]
        self.document = {**self.document, "progress": progress, "weight_here": weight}
        return 200, json.dumps(self.document).encode()


@contextmanager
def serve(text: str = "plain") -> Iterator[Site]:
    site = Site(text)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/internal/canary":
                site.tokens.append(self.headers["authorization"])
                self.answer(*site.read(), b"application/json", b"")
                return
            name = self.path.removeprefix("/canary").removeprefix("/") or "index.html"
            kind, body = static(name) or (b"text/plain", b"")
            self.answer(200 if body else 404, body, kind, FILE_LINES)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.answer(*site.act(json.loads(body)), b"application/json", b"")

        def answer(self, status: int, body: bytes, kind: bytes, lines: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind.decode())
            self.send_header("content-length", str(len(body)))
            for line in lines.decode().splitlines():
                self.send_header(*line.split(": ", 1))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Tests say what went wrong."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}/canary"
        try:
            yield site
        finally:
            site.gate.set()
            server.shutdown()
            thread.join(MOST_WAIT_S)
