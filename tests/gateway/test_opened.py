"""An answer that prefill began is put together with what decode wrote."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.dialect import Opening
from disagg_plugins.gateway.opened import Opened

DONE = b"data: [DONE]\n\n"


def opened() -> Opened:
    return Opened(Opening([5, 6, 7], 8, "Once"))


def event(text: str | None, finish: str | None = None, usage: object = None, **more) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": finish, **more}]
    plain = {"id": "c1", "object": "text_completion", "model": "m", "choices": choices}
    if usage is not None:
        plain["usage"] = usage
    return b"data: " + json.dumps(plain, separators=(",", ":")).encode() + b"\n\n"


def events(data: bytes) -> list[dict]:
    assert data.endswith(DONE)
    return [json.loads(e[5:]) for e in data[: -len(DONE)].split(b"\n\n") if e]


def usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def test_a_stream_begins_with_an_event_of_what_prefill_wrote() -> None:
    this = opened()
    first = this.stream(event(" upon", stop_reason=None))
    later = event(" a") + event(" time", "stop", stop_reason=7)
    assert this.stream(later) == later
    said = events(first + later + this.stream(DONE))
    assert [e["choices"][0]["text"] for e in said] == ["Once", " upon", " a", " time"]
    assert [e["choices"][0]["finish_reason"] for e in said] == [None, None, None, "stop"]
    assert {(e["id"], e["object"], e["model"]) for e in said} == {("c1", "text_completion", "m")}


def test_an_end_in_the_first_event_stays_at_the_end() -> None:
    said = events(opened().stream(event("", "stop", stop_reason=7) + DONE))
    assert [e["choices"][0]["text"] for e in said] == ["Once", ""]
    assert [e["choices"][0]["finish_reason"] for e in said] == [None, "stop"]
    assert [e["choices"][0]["stop_reason"] for e in said] == [None, 7]


def test_the_first_token_is_counted_as_a_part_of_the_answer() -> None:
    this = opened()
    data = this.stream(
        event(" upon", "length", usage(4, 1)) + event(None, usage=usage(4, 1)) + DONE
    )
    said = events(data)
    assert "usage" not in said[0]
    assert [e["usage"] for e in said[1:]] == [usage(3, 2)] * 2
    assert this.counts(4, 1) == (3, 2)
    assert this.counts(None, None) == (None, None)


def test_a_usage_with_blanks_is_counted_too() -> None:
    this = opened()
    this.stream(event(" upon"))
    late = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\n'
    (said,) = events(this.stream(late) + DONE)
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize("before", [b"", event(None, usage=usage(4, 0))])
def test_decode_that_had_nothing_to_add_loses_nothing(before: bytes) -> None:
    said = events(opened().stream(before + DONE))
    assert said[-1]["choices"][0]["text"] == "Once"


def test_lines_of_other_kinds_pass() -> None:
    assert opened().stream(b": ping\n\n") == b": ping\n\n"


def whole(text: object = " upon", counted: object = None, choices: int = 1) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": "length"}
    answer = {"id": "c1", "choices": [choice] * choices, "usage": counted or usage(4, 1)}
    return json.dumps(answer).encode()


def test_a_whole_answer_is_put_together() -> None:
    answer = json.loads(opened().whole(whole()))
    assert answer["choices"][0]["text"] == "Once upon"
    assert answer["usage"] == usage(3, 2)


def test_an_answer_without_usage_has_none() -> None:
    answer = json.loads(opened().whole(b'{"choices": [{"text": " upon"}]}'))
    assert answer == {"choices": [{"text": "Once upon"}]}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (whole(counted=usage(3, 2)), "read 3 tokens, not the 4"),
        (whole(counted={"prompt_tokens": "4"}), "not the 4"),
        (whole(choices=2), "one choice"),
        (whole(choices=0), "one choice"),
        (whole(text=None), "one choice with a text"),
        (b"[]", "one choice"),
        (b"{", "not JSON"),
    ],
)
def test_an_answer_to_something_else_is_refused(answer: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        opened().whole(answer)


@pytest.mark.parametrize("beside", [b": keep-alive\n", b"event: completion\n", b"id: 1\n"])
@pytest.mark.parametrize("always", [False, True])
def test_events_may_have_other_lines_before_their_data(beside: bytes, always: bool) -> None:
    this = opened()
    data = this.stream(beside + event(" upon", usage=usage(4, 1)))
    data += this.stream((beside if always else b"") + event(" a", "length"))
    said = [json.loads(line[5:]) for line in data.splitlines() if line.startswith(b"data:")]
    assert [e["choices"][0]["text"] for e in said] == ["Once", " upon", " a"]
    assert said[1]["usage"] == usage(3, 2)
    assert data.count(beside) == 1 + always


def test_what_cannot_be_read_comes_after_the_first_token() -> None:
    this = opened()
    data = this.stream(b"data: {half\n\n") + this.stream(event(" upon", "length"))
    first, odd, last = data.split(b"\n\n")[:-1]
    assert json.loads(first[5:])["choices"][0]["text"] == "Once"
    assert odd == b"data: {half"
    assert json.loads(last[5:])["choices"][0]["text"] == " upon"


def test_nothing_is_added_to_an_error() -> None:
    error = b'data: {"error": {"message": "no", "code": 400}}\n\n'
    assert opened().stream(error + DONE) == error + DONE


def test_a_field_for_errors_that_is_empty_is_none() -> None:
    data = opened().stream(event(" upon").replace(b"{", b'{"error":null,', 1))
    assert [json.loads(e[5:])["choices"][0]["text"] for e in data.split(b"\n\n") if e] == [
        "Once",
        " upon",
    ]


def test_a_stream_that_read_another_prompt_is_found_by_its_usage() -> None:
    this = opened()
    assert this.misread(event(" upon") + event(" a", usage=usage(4, 1))) is None
    assert this.misread(event(" a", usage={"completion_tokens": 1})) is None
    why = this.misread(event(" a") + b": ping\n" + event(None, usage=usage(999, 1)))
    assert why is not None
    assert "read 999 tokens, not the 4" in why


def test_a_usage_over_two_lines_is_counted_too() -> None:
    this = opened()
    data = (
        b'data: {"choices": [], "usage":\ndata: {"prompt_tokens": 9, "completion_tokens": 1}}\n\n'
    )
    assert this.misread(data) is not None
    right = data.replace(b": 9", b": 4")
    assert this.misread(right) is None
    this.stream(event(" upon"))
    (said,) = events(this.stream(right) + DONE)
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
