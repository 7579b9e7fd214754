"""Pretend context and generation servers that follow the published protocol, or do not.

Requests with keys that the protocol does not have are refused, as pydantic models that forbid
extras would. Written from ``serve/openai_disagg_service.py``; see ``disagg_trtllm.native``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KNOWN = {
    "model", "prompt", "messages", "max_tokens", "stream", "stream_options", "temperature",
    "disaggregated_params", "prompt_token_ids",
}  # fmt: skip
PARAMS = {
    "request_type", "first_gen_tokens", "ctx_request_id", "encoded_opaque_state", "draft_tokens",
    "disagg_request_id", "ctx_dp_rank", "ctx_info_endpoint", "schedule_style",
}  # fmt: skip
PROMPT_IDS = [1, 15043]

Change = Callable[[dict[str, Any]], Any]


@dataclass
class NativeServer:
    """One server; a context manager.

    Args:
        change: Applied to what it would answer to a context request; what it returns is sent,
            text as it is.
        hangs: Whether a context request is never answered.
        refuses: Whether a generation request is answered with 400.
    """

    change: Change = lambda answer: answer
    hangs: bool = False
    refuses: bool = False
    finish_reason: str = "length"
    state: str = "b3BhcXVl"
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> NativeServer:
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and answer to a completion or chat."""
        self.seen.append(body)
        if unknown := set(body) - KNOWN:
            return 400, {"error": {"message": f"extra inputs: {sorted(unknown)}"}}
        params = body.get("disaggregated_params")
        if params is None:
            return 200, self._written(body)
        if unknown := set(params) - PARAMS:
            return 400, {"error": {"message": f"extra inputs: {sorted(unknown)}"}}
        if params["request_type"] == "context_only":
            if self.hangs:
                self._released.wait(60)
            return 200, self.change(self._context(body, params))
        missing = [key for key in ("first_gen_tokens", "ctx_request_id") if key not in params]
        if params["request_type"] != "generation_only" or missing or self.refuses:
            return 400, {"error": {"message": f"missing: {missing}"}}
        return 200, self._written(body)

    def _context(self, body: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        request_id = params["disagg_request_id"]
        text = (
            {"message": {"role": "assistant", "content": "Hi"}}
            if "messages" in body
            else {"text": "Hi"}
        )
        told = {
            "request_type": "context_only", "first_gen_tokens": [29892],
            "ctx_request_id": request_id, "encoded_opaque_state": self.state,
            "draft_tokens": None, "disagg_request_id": request_id, "ctx_dp_rank": 0,
            "ctx_info_endpoint": None, "schedule_style": 0,
        }  # fmt: skip
        return {
            "id": "x", "object": "chat.completion" if "messages" in body else "text_completion",
            "prompt_token_ids": PROMPT_IDS,
            "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
            "choices": [
                {
                    "index": 0, **text, "finish_reason": self.finish_reason,
                    "disaggregated_params": told,
                }
            ],
        }  # fmt: skip

    def _written(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "y", "object": "text_completion",
            "choices": [{"index": 0, "text": "Hi there", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4},
        }  # fmt: skip


def _handler(server: NativeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "m"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = server.answer(body)
            if status == 200 and body.get("stream"):
                events = b"data: " + json.dumps(answer).encode() + b"\n\ndata: [DONE]\n\n"
                self._send(200, events, "text/event-stream")
            else:
                self._send(status, answer)

        def _send(self, status: int, answer: Any, kind: str = "application/json") -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            if isinstance(answer, str):
                data = answer.encode()
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
