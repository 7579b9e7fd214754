"""What is noted of a stream, what is asked of the next worker, and what is said of the end."""

from __future__ import annotations

import json

import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway.openai import ParsedRequest, parse_request
from disagg_plugins.gateway.resumption import Resumption
from disagg_plugins.gateway.sse import SseObserver
from disagg_plugins.policy import GatewayPolicy
from disagg_plugins.types import Role, Worker
from disagg_vllm.dialect import VllmDialect

Body = dict[str, object]
DONE = b"data: [DONE]\n\n"
WORKER = Worker("d1", "http://127.0.0.1:1", "vllm", Role.DECODE)
ERROR = b'data: {"error":{"message":"it died","code":500}}\n\n'


def parsed(**more: object) -> ParsedRequest:
    body = {"model": "m", "prompt": "hi", "stream": True, **more}
    return parse_request("/v1/completions", json.dumps(body).encode(), chars_per_token=4.0)


def event(text: str, ids: list[int], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish, "token_ids": ids, **more}
    return b"data: %b\n\n" % json.dumps({"id": "a", "choices": [choice]}).encode().replace(
        b'"token_ids": ', b'"token_ids":'
    ).replace(b'"prompt_token_ids": ', b'"prompt_token_ids":').replace(b'"text": ', b'"text":')


def begun(**more: object) -> Resumption:
    resumption = Resumption(parsed(**more), GatewayPolicy())
    body = resumption.body(VllmDialect(), WORKER, parsed(**more).body)
    if resumption.trail is not None:
        assert body.get("return_token_ids") is True
    resumption.outgoing(event("A", [1], prompt_token_ids=[7, 8]))
    return resumption


def observed(*data: bytes) -> SseObserver:
    sse = SseObserver()
    for piece in data:
        sse.feed(piece)
    return sse


def test_next_worker_is_asked_for_what_follows() -> None:
    resumption = begun(max_tokens=8)
    assert resumption.obstacle() is None
    body = resumption.next_body(VllmDialect(), WORKER)
    assert (body.get("prompt"), body.get("max_tokens")) == ([7, 8, 1], 7)
    assert resumption.context_tokens == 3


def test_answer_at_its_bound_cannot_go_on() -> None:
    with pytest.raises(LocalProtocolError, match="all 1 tokens were written"):
        begun(max_tokens=1).next_body(VllmDialect(), WORKER)


@pytest.mark.parametrize("usage", [False, True])
def test_answer_at_its_bound_of_which_only_the_end_is_missing_is_ended(usage: bool) -> None:
    resumption = begun(max_tokens=2, stream_options={"include_usage": usage})
    assert resumption.missing_end(observed(event("A", [1]))) is None
    resumption.outgoing(event("B", [2]))
    missing = resumption.missing_end(observed(event("B", [2]))) or b""
    finish, *rest = [e for e in missing.split(b"\n\n") if e]
    (choice,) = json.loads(finish[6:])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert rest[-1] == b"data: [DONE]"
    assert [json.loads(e[6:])["usage"]["completion_tokens"] for e in rest[:-1]] == [2] * usage


def test_bound_that_no_key_names_is_the_engines() -> None:
    resumption = begun()
    for number in range(2, 17):
        assert resumption.missing_end(observed()) is None
        resumption.outgoing(event("B", [number]))
    assert b'"finish_reason":"length"' in (resumption.missing_end(observed()) or b"")


def test_answer_at_its_bound_whose_last_text_is_held_back_goes_on() -> None:
    resumption = begun(max_tokens=2)
    resumption.outgoing(event("", [2]))
    assert resumption.missing_end(observed()) is None
    assert resumption.next_body(VllmDialect(), WORKER).get("max_tokens") == 1


@pytest.mark.parametrize(
    "more",
    [{"logprobs": 0}, {"logprobs": 1}, {"prompt": ["a", "b"]}, {"prompt": ["a"]},
     {"prompt": [[1, 2]]}, {"prompt": [[1, 2], [3]]}, {"truncate_prompt_tokens": 0}],
)  # fmt: skip
def test_wish_that_depends_on_where_the_answer_began_is_not_resumable(more: Body) -> None:
    resumption = begun(**more)
    assert resumption.trail is None
    assert resumption.obstacle() is not None


def test_logprobs_turned_off_is_no_wish_for_them() -> None:
    assert begun(logprobs=False).obstacle() is None
    assert begun(logprobs=None).obstacle() is None


def test_prompt_of_token_ids_goes_on_from_the_ids_that_the_worker_told() -> None:
    resumption = begun(prompt=[7, 8])
    assert resumption.next_body(VllmDialect(), WORKER).get("prompt") == [7, 8, 1]


@pytest.mark.parametrize(
    ("more", "policy"),
    [({"stream": False}, {}), ({}, {"resume": False}), ({}, {"resumes": 0})],
)
def test_nothing_is_asked_or_noted_where_nothing_goes_on(
    more: dict[str, object], policy: dict[str, object]
) -> None:
    request = parsed(**more)
    resumption = Resumption(request, GatewayPolicy.model_validate(policy))
    assert resumption.times == 0
    assert resumption.body(VllmDialect(), WORKER, request.body) is request.body
    assert resumption.obstacle() is not None


def test_dialect_without_the_methods_is_named() -> None:
    resumption = Resumption(parsed(), GatewayPolicy())
    resumption.body(None, WORKER, parsed().body)
    assert resumption.obstacle() == "vllm workers cannot go on with an answer"


def test_what_came_before_a_failure_in_the_same_read_is_passed_on() -> None:
    good = event("B", [2])
    assert begun().failure(good + ERROR + DONE) == (good, "it died")
    assert begun().failure(good) == (good, None)
    assert begun(stop="x").failure(good + ERROR) == (good + ERROR, None)


def test_end_mark_is_what_is_missing_after_the_finish_reason() -> None:
    last = observed(event("B", [2], "stop"))
    assert begun().missing_end(last) == DONE
    assert begun(stop="x").missing_end(last) == DONE
    assert begun().missing_end(observed(event("B", [2], "stop"), ERROR)) == DONE
    assert begun(n=2).missing_end(last) is None
    assert begun().missing_end(observed(event("B", [2]))) is None
    assert begun().missing_end(None) is None


def test_usage_is_told_where_it_was_asked_for_and_is_known() -> None:
    asked = {"stream_options": {"include_usage": True}}
    last = event("B", [2], "stop")
    resumption = begun(**asked)
    resumption.outgoing(last)
    missing = resumption.missing_end(observed(last)) or b""
    assert json.loads(missing.split(b"\n\n")[0][6:])["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4,
    }  # fmt: skip
    assert missing.endswith(DONE)
    assert begun(stop="x", **asked).missing_end(observed(last)) is None


def test_worker_that_fails_before_it_has_caught_up_ends_the_resuming() -> None:
    resumption = begun()
    resumption.outgoing(event("BC", [2, 3]))
    resumption.next_body(VllmDialect(), WORKER)
    assert "caught up" in (resumption.obstacle() or "")
    assert resumption.outgoing(event("X", [2])) is not None
    assert resumption.problem is not None
