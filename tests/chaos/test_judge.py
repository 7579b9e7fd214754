from __future__ import annotations

import json

import pytest

from tests.chaos.judge import Reply, judge

RIGHT = "t1 t2 t3 "


def stream(*texts: str, error: str | None = None, done: bool = True) -> bytearray:
    events: list[object] = [{"choices": [{"index": 0, "text": t}]} for t in texts]
    events += [{"error": {"message": error}}] if error else []
    body = b"".join(b"data: %b\n\n" % json.dumps(e).encode() for e in events)
    return bytearray(body + (b"data: [DONE]\n\n" if done else b""))


def whole(text: str) -> bytearray:
    return bytearray(json.dumps({"choices": [{"index": 0, "text": text}]}).encode())


@pytest.mark.parametrize(
    ("reply", "is_stream", "verdict"),
    [
        (Reply(200, stream("t1 ", "t2 t3 "), complete=True), True, "right"),
        (Reply(200, stream("t1 ", "t2 t3 "), complete=False), True, "right"),
        (Reply(200, stream("t1 ", error="gone", done=False)), True, "clear_error"),
        (Reply(200, stream("t1 ", done=False)), True, "lost"),
        (Reply(200, stream("t1 "), complete=True), True, "wrong"),
        (Reply(200, stream("t1 ", "t2 t3 ", done=False), complete=True), True, "wrong"),
        (Reply(200, stream("t1 ", "t1 ", "t2 "), complete=True), True, "duplicated"),
        (Reply(200, stream("t1 ", "t9 "), complete=True), True, "wrong"),
        (Reply(200, stream("t9 ", error="gone"), complete=True), True, "wrong"),
        (Reply(200, stream(RIGHT), complete=True, surplus=True), True, "duplicated"),
        (Reply(200, whole(RIGHT), complete=True), False, "right"),
        (Reply(200, whole("t1 t2 "), complete=True), False, "wrong"),
        (Reply(200, whole(RIGHT)[:10], problem="closed"), False, "lost"),
        (Reply(502, bytearray(b'{"error": {"message": "m"}}'), complete=True), True, "clear_error"),
        (Reply(502, bytearray(b"Bad Gateway"), complete=True), True, "lost"),
        (Reply(0, problem="closed"), True, "lost"),
        (Reply(0, problem="closed", aborted=True), True, "client_abort"),
        (Reply(0, problem="closed", gateway_gone=True), True, "clear_error"),
        (Reply(200, stream("t9 "), aborted=True), True, "wrong"),
    ],
)
def test_verdicts(reply: Reply, is_stream: bool, verdict: str) -> None:
    assert judge(reply, RIGHT, stream=is_stream)[0] == verdict
