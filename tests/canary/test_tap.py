"""Reading an answer on its way: in any pieces, bounded, and never harming it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.tap import MOST_PENDING_BYTES, Tap

HEAD = b"content-type: text/event-stream\r\n"


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"


STREAM = b"".join(map(event, ["Par", "is", ", é"])) + b"data: [DONE]\n\n"


def read(pieces: list[bytes], last: bytes = b"") -> Tap:
    tap = Tap()
    tap.start(200, HEAD, pieces[0])
    for piece in pieces[1:]:
        tap.write(piece)
    tap.complete(last)
    return tap


@given(st.sets(st.integers(1, len(STREAM) - 1)))
def test_a_stream_reads_the_same_in_any_pieces(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    answer = read(pieces).answer()
    assert answer is not None
    assert (answer.text, answer.cut) == ("Paris, é", False)


def test_an_answer_in_one_piece_is_read() -> None:
    tap = Tap()
    tap.whole(200, json.dumps({"choices": [{"text": "yes"}]}).encode())
    assert tap.answer().text == "yes"  # type: ignore[union-attr]


def test_an_answer_that_broke_off_is_none() -> None:
    tap = Tap()
    tap.start(200, HEAD, event("Par"))
    assert tap.answer() is None


@pytest.mark.parametrize("body", [b"data: {broken\n\n", b"data: " + b"[" * 100_000 + b"\n\n"])
def test_what_is_no_json_is_no_answer(body: bytes) -> None:
    assert read([event("Par"), body]).answer() is None


def test_an_error_is_no_answer() -> None:
    tap = Tap()
    tap.whole(503, b'{"error":{}}')
    assert tap.answer() is None


def test_an_event_without_end_is_given_up() -> None:
    tap = read([b"data: ", b"x" * (MOST_PENDING_BYTES + 1), b"more"])
    assert tap.answer() is None
    assert not tap._pending
