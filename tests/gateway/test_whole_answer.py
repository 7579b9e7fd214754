"""A whole answer as the client asked for it."""

from __future__ import annotations

import json

from disagg_plugins.gateway.whole_answer import DONE, EVENTS_LINE, JSON_LINE, as_asked

CHAT = {
    "id": "1", "object": "chat.completion", "usage": {"total_tokens": 3},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}}],
}  # fmt: skip


def test_in_one_piece_it_stays_as_it_is() -> None:
    body, line = as_asked(CHAT, stream=False, usage=True)
    assert (json.loads(body), line) == (CHAT, JSON_LINE)


def test_as_a_stream_it_is_one_event_and_the_usage_where_it_is_wanted() -> None:
    body, line = as_asked(CHAT, stream=True, usage=True)
    assert line == EVENTS_LINE
    assert body.endswith(DONE)
    first, usage = (json.loads(e[6:]) for e in body.removesuffix(DONE).split(b"\n\n") if e)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}}]
    assert "usage" not in first
    assert (usage["choices"], usage["usage"]) == ([], {"total_tokens": 3})
    body, _ = as_asked(CHAT, stream=True, usage=False)
    assert body.count(b"data: ") == 2


def test_what_is_no_list_of_choices_has_none() -> None:
    body, _ = as_asked({"choices": 5, "object": "text_completion"}, stream=True, usage=False)
    assert json.loads(body.split(b"\n\n")[0][6:])["choices"] == []
