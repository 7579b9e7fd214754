"""The observer forwards whole events, byte for byte, however the stream is cut."""

from __future__ import annotations

import json
import random

import pytest

from disagg_plugins.gateway.sse import (
    MAX_HELD_BYTES,
    SseObserver,
    StreamEnd,
    carries_output,
    read_answer,
)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


TOKENS = [event(choices=[{"text": f"t{i}", "finish_reason": None}]) for i in range(20)]
LAST = event(choices=[{"text": "", "finish_reason": "stop"}])
USAGE = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 21})
DONE = b"data: [DONE]\n\n"
STREAM = b"".join([*TOKENS, LAST, USAGE, DONE])


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_forwards_the_same_bytes_in_whole_events(seed: int) -> None:
    rng = random.Random(seed)
    observer, out, rest = SseObserver(), [], STREAM
    while rest:
        size = rng.choice([1, 3, 17, 200])
        piece = observer.feed(rest[:size])
        assert piece == b"" or piece.endswith(b"\n\n")
        out.append(piece)
        rest = rest[size:]
    assert b"".join(out) == STREAM
    assert observer.done
    assert not observer.held


def test_end_reads_finish_and_usage() -> None:
    observer = SseObserver()
    for piece in [*TOKENS, LAST, USAGE, DONE]:
        assert observer.feed(piece) == piece
    assert observer.end() == StreamEnd("stop", 5, 21, None)


def test_end_without_usage_knows_the_finish_reason() -> None:
    observer = SseObserver()
    observer.feed(TOKENS[0] + LAST + DONE)
    assert observer.end() == StreamEnd("stop", None, None, None)


def test_stream_without_done_is_not_done() -> None:
    observer = SseObserver()
    observer.feed(TOKENS[0] + b"data: {")
    assert not observer.done
    assert observer.held
    assert observer.rest() == b"data: {"


def test_carriage_returns_separate_events_too() -> None:
    observer = SseObserver()
    assert observer.feed(b"data: {}\r\n\r\ndata: [DO") == b"data: {}\r\n\r\n"
    assert observer.feed(b"NE]\r\n\r\n") == b"data: [DONE]\r\n\r\n"
    assert observer.done


def test_error_event_is_seen() -> None:
    observer = SseObserver()
    observer.feed(b'data: {"error": {"message": "engine died"}}\n\n' + DONE)
    assert observer.end().error == "engine died"


def test_endless_event_is_not_held_for_ever() -> None:
    observer = SseObserver()
    assert observer.feed(b"data: " + b"x" * MAX_HELD_BYTES) != b""


@pytest.mark.parametrize("garbage", [b"", b"{", b"[1]", b"\xff", b'{"choices": 1, "usage": []}'])
def test_garbage_says_nothing(garbage: bytes) -> None:
    assert read_answer(garbage) == StreamEnd()


VLLM_HEAD = b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m",'
VLLM_CHAT = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
QUOTED = json.dumps({"text": '"choices":[{'}).encode()[1:-1]


@pytest.mark.parametrize(
    ("read", "output"),
    [
        (VLLM_HEAD + b'"choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n', True),
        (VLLM_CHAT + b'"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n', True),
        (VLLM_HEAD + b'"choices":[{"index":0,"text":""}],"usage":{"total_tokens":3}}\n\n', True),
        (VLLM_HEAD + b'"choices":[],"usage":{"completion_tokens":16}}\n\n', False),
        (VLLM_CHAT + b'"choices":[],"usage":{"completion_tokens":16}}\n\ndata: [DONE]\n\n', False),
        (DONE, False),
        (b": ping\n\n", False),
        (USAGE, False),
        (TOKENS[0], True),
        (LAST + USAGE + DONE, True),
        (b'data: {"choices":[],' + QUOTED + b"}\n\n", False),
    ],
)
def test_only_events_with_choices_carry_output(read: bytes, output: bool) -> None:
    assert carries_output(read) is output


def test_end_mark_that_came_in_one_chunk_with_usage_is_seen() -> None:
    observer = SseObserver()
    observer.keep(USAGE + DONE + b"\r\n")
    assert observer.ended
