"""Ids out of bytes: what is stripped, where an answer can go on, what is skipped."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.gateway.chunks import stripping
from disagg_plugins.gateway.sse import SseObserver
from disagg_plugins.gateway.trail import Resumed, Trail


def event(text: str, ids: list[int], **more: object) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": ids, **more}
    plain = {"id": "a", "choices": [choice]}
    return b"data: " + json.dumps(plain, separators=(",", ":")).encode() + b"\n\n"


def begun() -> Trail:
    trail = Trail()
    trail.take(event("A", [1], prompt_token_ids=[7, 8]))
    return trail


def test_ids_are_noted_and_taken_out() -> None:
    trail = begun()
    assert trail.prompt == [7, 8]
    out = trail.take(event('say "token_ids":[3]', [2]))
    assert json.loads(out[6:])["choices"][0] == {
        "index": 0, "text": 'say "token_ids":[3]', "token_ids": None,
    }  # fmt: skip
    assert trail.ids.tolist() == [1, 2]


def test_held_back_character_is_computed_again() -> None:
    trail = begun()
    trail.take(event("", [2]))
    assert trail.cut() == ""
    assert trail.ids.tolist() == [1]


def test_text_of_bundled_ids_is_skipped_in_the_next_answer() -> None:
    trail = begun()
    trail.take(event("BC", [2, 3, 4]))
    owed = trail.cut()
    assert (owed, trail.ids.tolist()) == ("BC", [1])
    resumed = Resumed(trail, owed)
    out = resumed.take(event("B", [2]) + event("CD", [3]) + event("é", [4]))
    texts = [json.loads(e[6:])["choices"][0]["text"] for e in out.split(b"\n\n") if e]
    assert "".join(texts) == "Dé"
    assert resumed.problem is None
    assert trail.ids.tolist() == [1, 2, 3, 4]


def test_other_way_is_noticed() -> None:
    trail = begun()
    trail.take(event("BC", [2, 3]))
    resumed = Resumed(trail, trail.cut())
    resumed.take(event("X", [9]))
    assert resumed.problem is not None


def test_ids_of_every_event_in_one_read_are_taken_out() -> None:
    for end in (b"\n", b"\r\n"):
        trail = begun()
        out = trail.take((event("B", [2]) + event("C", [3])).replace(b"\n", end))
        assert b'"token_ids":[' not in out
        assert trail.ids.tolist() == [1, 2, 3]


def test_event_in_pieces_ends_the_noting() -> None:
    trail = begun()
    trail.take(event("B", [2])[:-9])
    assert trail.problem() is not None
    resumed = Resumed(begun(), "")
    assert resumed.take(event("B", [2])[:-9]) == b""
    assert resumed.problem is not None


EVENTS = st.lists(
    st.tuples(st.text('aé\\"{[ ', max_size=4), st.lists(st.integers(0, 60_000), max_size=12)),
    max_size=40,
)


@given(said=EVENTS)
def test_short_way_does_what_the_long_way_does(said: list[tuple[str, list[int]]]) -> None:
    slow, fast, sent = begun(), begun(), []

    def long_way(data: bytes) -> None:
        sent.append(fast.take(data))

    take = stripping(fast, SseObserver(), lambda _: None, sent.append, long_way)
    for text, ids in said:
        data = event(text, ids)
        take(b"%x\r\n%b\r\n" % (len(data), data))
        plain = json.loads(slow.take(data)[6:])
        got = sent[-1]
        got = got[got.find(b"data: ") :]
        assert json.loads(got[6:].strip()) == plain
        assert plain["choices"][0]["token_ids"] is None
    assert fast.problem() == slow.problem()
    assert fast.ids.tolist() == slow.ids.tolist()
    assert (fast.sure, fast.cut()) == (slow.sure, slow.cut())
    assert fast.ids.tolist() == slow.ids.tolist()


def test_chunk_keeps_its_length_on_the_short_way() -> None:
    sent: list[bytes] = []
    take = stripping(begun(), SseObserver(), lambda _: None, sent.append, sent.append)
    data = event("B", [12345])
    chunk = b"%x\r\n%b\r\n" % (len(data), data)
    take(chunk)
    assert len(sent[0]) == len(chunk)
    assert b'"token_ids":null   }' in sent[0]
