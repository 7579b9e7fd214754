"""A stand-in for an engine's server: answers /health, and misbehaves on request.

``python server.py --port N [--child] [--deaf] [--crash TEXT] [--slow-s S]``
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLEEPER = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(600)"
)


class Handler(BaseHTTPRequestHandler):
    """Says that it is well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--child", action="store_true", help="a deaf child in its own session")
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--crash", help="print this and end with code 3")
    parser.add_argument("--never", action="store_true", help="listen to nobody")
    args = parser.parse_args()
    print("starting", flush=True)
    if args.crash:
        print(args.crash, flush=True)
        sys.exit(3)
    if args.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.child:
        child = subprocess.Popen(
            [sys.executable, "-c", SLEEPER], start_new_session=True, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        print(f"child {child.pid}", flush=True)
    if args.never:
        time.sleep(600)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    signal.signal(
        signal.SIGTERM,
        signal.SIG_IGN
        if args.deaf
        else lambda *_: threading.Thread(target=server.shutdown).start(),
    )
    server.serve_forever()


if __name__ == "__main__":
    main()
