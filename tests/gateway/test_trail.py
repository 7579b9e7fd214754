"""Ids out of bytes: what is stripped, where an answer can go on, what is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.gateway.chunks import stripping
from disagg_plugins.gateway.sse import SseObserver
from disagg_plugins.gateway.trail import UNREADABLE, Resumed, Trail

Decode = Callable[[bytes], object]


def event(text: str, ids: list[int], **more: object) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": ids, **more}
    plain = {"id": "a", "choices": [choice]}
    return b"data: " + json.dumps(plain, separators=(",", ":")).encode() + b"\n\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


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


ODD = st.sampled_from(
    [
        event("é", [5], finish_reason="length"),
        event("a", [6], delta={"tool_calls": [{"index": 0}]}),
        event("", [7]),
        event("q", []),
        event("B", [2]) + event("C", [3]),
        event("B", [2]) + b"data: [DONE]\n\n",
        event("B", [2]).replace(b"\n", b"\r\n"),
        event("B", [2]).replace(b"[2]", b"[2,,3]"),
        event("B", [2]).replace(b"[2]", b"[-2]"),
        event('","token_ids":[1],"text":"', [1234]),
        event("x" * 300, [1234]),
        b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n',
        b": still here\n\n",
    ]
)
"""What stands between the events of a stream."""


def check_short_way(events: list[bytes]) -> None:
    """Compare what the short way does with what noting each event by itself does."""
    slow, fast, sent = begun(), begun(), []

    def long_way(data: bytes) -> None:
        sent.append(framed(fast.take(data)))

    take = stripping(fast, SseObserver(), lambda _: None, sent.append, long_way)
    for data in events:
        if not take(framed(data)):
            long_way(data)
        expected = slow.take(data).replace(b"\r\n", b"\n").strip()
        line, got = sent[-1].split(b"\r\n", 1)
        assert got.endswith(b"\r\n")
        assert int(line, 16) == len(got) - 2
        assert b'"token_ids":[' not in got
        got = got.replace(b"\r\n", b"\n").strip()
        for one, other in zip(got.split(b"\n\n"), expected.split(b"\n\n"), strict=True):
            if one.startswith(b"data: {"):
                assert json.loads(one[6:]) == json.loads(other[6:])
            else:
                assert one == other
    assert fast.problem() == slow.problem()
    assert fast.ids.tolist() == slow.ids.tolist()
    if fast.why_not is not None:
        return
    assert (fast.sure, fast.cut()) == (slow.sure, slow.cut())
    assert fast.ids.tolist() == slow.ids.tolist()


@given(said=EVENTS)
def test_short_way_does_what_the_long_way_does(said: list[tuple[str, list[int]]]) -> None:
    check_short_way([event(text, ids) for text, ids in said])


ONE = st.builds(
    event, st.text('aé\\"', max_size=3), st.lists(st.integers(0, 70_000), min_size=1, max_size=1)
)


@given(events=st.lists(st.one_of(ONE, ONE, ONE, ODD), max_size=40))
def test_odd_events_between_usual_ones_are_seen(events: list[bytes]) -> None:
    check_short_way(events)


def test_usual_chunk_is_compared_with_the_form_of_those_before_it() -> None:
    """The form is learnt from an engine's own events; what differs from it goes the long way."""
    trail, sse, sent = begun(), SseObserver(), []
    take = stripping(trail, sse, lambda _: None, sent.append, sent.append)
    for number in range(10, 20):
        assert take(framed(event("B", [number])))
    assert len(sse.recent) == 1  # nothing of the later ones was worth keeping
    assert trail.problem() is None
    assert (trail.sure, trail.ids.tolist()) == (11, [1, *range(10, 20)])
    assert take(framed(event("", [20], finish_reason="stop")))
    assert sse.end().finish == "stop"
    assert trail.sure == 11


def test_read_that_is_no_chunk_is_left_to_the_parser() -> None:
    take = stripping(begun(), SseObserver(), lambda _: None, list, list)
    data = framed(event("B", [12345]))
    for wrong in (data[1:], data[:-1], data + data, data + b"0\r\n\r\n", b"f" + data):
        assert not take(wrong)
    assert take(data)


def test_chunk_keeps_its_length_on_the_short_way() -> None:
    sent: list[bytes] = []
    take = stripping(begun(), SseObserver(), lambda _: None, sent.append, sent.append)
    data = event("B", [12345])
    chunk = b"%x\r\n%b\r\n" % (len(data), data)
    take(chunk)
    assert len(sent[0]) == len(chunk)
    assert b'"token_ids":null   }' in sent[0]


def raw(ids: bytes, text: str = "B") -> bytes:
    return event(text, [77]).replace(b"[77]", ids)


@pytest.mark.parametrize(
    "ids", [b"[1,,2]", b"[,]", b"[x]", b"[-1]", b"[1.5]", b"[1e3]", b"[123456789012345678901]",
            b"[1 2]", b'["5"]', b"[[1]]", b"[null]", b"[1", b"[" + b"9" * 5000 + b"]"],
)  # fmt: skip
@pytest.mark.parametrize("short", [True, False])
def test_ids_that_are_none_only_end_the_noting(ids: bytes, short: bool) -> None:
    trail, sent = begun(), []
    take = stripping(
        trail, SseObserver(), lambda _: None, sent.append, lambda d: sent.append(trail.take(d))
    )
    for data in (event("A", [10]), raw(ids), event("C", [11])):
        if short:
            assert take(framed(data))
        else:
            sent.append(trail.take(data))
    assert len(sent) == 3
    assert trail.problem() == UNREADABLE
    assert trail.cut() is not None


def test_prompt_ids_that_are_none_only_end_the_noting() -> None:
    for ids in (b"[1,,2]", b"[x]", b"[-1]", b"[" + b"9" * 30 + b"]"):
        trail = Trail()
        out = trail.take(event("A", [1], prompt_token_ids=[77]).replace(b"[77]", ids))
        assert json.loads(out[6:])["choices"][0]["prompt_token_ids"] is None
        assert trail.problem() == UNREADABLE


def test_empty_list_of_ids_holds_text_back_like_a_bundle() -> None:
    trail = begun()
    trail.take(event("B", []))
    assert trail.problem() is None
    assert (trail.cut(), trail.ids.tolist()) == ("B", [1])


@pytest.mark.parametrize("ids", [["x"], [-1], [1 << 70], [True], [1.5], [None]])
def test_next_workers_ids_that_are_none_only_end_the_noting(ids: list[object]) -> None:
    trail = begun()
    trail.cut()
    resumed = Resumed(trail, "")
    out = resumed.take(event("B", ids))  # type: ignore[arg-type]
    assert json.loads(out[6:])["choices"][0]["text"] == "B"
    assert resumed.problem is None
    assert trail.problem() == UNREADABLE


@pytest.mark.parametrize("decode", [json.loads, msgspec.json.decode, msgspec.json.Decoder().decode])
def test_strict_parsers_read_an_event_whose_ids_were_taken_out(decode: Decode) -> None:
    sent: list[bytes] = []
    take = stripping(begun(), SseObserver(), lambda _: None, sent.append, sent.append)
    for ids in ([12], [1234567], [1234567], [1, 2, 3]):
        take(framed(event("B", ids)))
    assert len(sent) == 4
    for chunk in sent:
        plain = decode(chunk.split(b"\r\n")[1].strip()[6:])
        assert plain == {"id": "a", "choices": [{"index": 0, "text": "B", "token_ids": None}]}


def test_orjson_reads_an_event_whose_ids_were_taken_out() -> None:
    orjson = pytest.importorskip("orjson", reason="orjson is not installed")
    test_strict_parsers_read_an_event_whose_ids_were_taken_out(orjson.loads)


def test_tokens_are_counted_as_long_as_no_id_is_missing() -> None:
    assert Trail().counts is None
    trail = begun()
    trail.take(event("b", [6, 7]))
    assert trail.counts == (2, 3)
    trail.take(event("c", ["x"]))  # type: ignore[list-item]
    assert trail.counts is None
