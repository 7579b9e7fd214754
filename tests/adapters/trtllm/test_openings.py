"""Decode goes on from the token that prefill wrote; every KV byte checked on every forward."""

from __future__ import annotations

import threading
import time

import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_reference.trtllm.interface import ERAS
from disagg_trtllm import openings
from disagg_trtllm.openings import MAX_PROMPT_TOKENS, MOST, Openings
from tests.adapters.trtllm.conftest import Build, Pair, prompt
from tests.adapters.trtllm.deterministic import states


def publish(two: Pair, given: tuple[int, ...], number: int, ticket: str, **more: object) -> int:
    """Let prefill read a prompt; return the token that it wrote."""
    said = {"version": 1, "step": "prefill", "request_id": number, "ticket": ticket, **more}
    assert two.prefill.announce(said) == (200, {})
    (token,) = two.prefill.ask(given, 1, number).tokens
    return token


def question(two: Pair, number: int, ticket: str):
    return two.prefill.announce(
        {"version": 1, "step": "opening", "request_id": number, "ticket": ticket}
    )


WAYS = list(zip(ERAS * 2, ["sync", "async", "async", "sync"],
                [(1, 1), (1, 1), (2, 2), (1, 2)], strict=True))  # fmt: skip


@pytest.mark.parametrize(("era", "loads", "ranks"), WAYS, ids=str)
def test_all_of_the_prompt_is_loaded_and_none_computed_again(pair: Build, era, loads, ranks):
    two = pair(era=era, loads=loads, ranks=ranks)
    for length in (1, 8, 9, 40):
        given, number, ticket = prompt(length), two.number(), two.ticket()
        token = publish(two, given, number, ticket, opening=True)
        assert token == states(given)[-1] % 250
        assert question(two, number, ticket) == (200, {"prompt": list(given), "token": token})
        assert two.fetch(given, number, ticket) == (200, {})
        asked = two.decode.ask((*given, token), 9, number)
        assert len(asked.tokens) == 9
        assert asked.tokens[0] == states((*given, token))[-1] % 250
        assert asked.request.matched_tokens == length
    two.prefill.wait_empty()
    two.decode.wait_empty()
    assert {r["tokens_recomputed"] for r in two.decode.reports} == {0}


def test_a_beginning_that_decode_has_is_left_alone(pair: Build) -> None:
    two = pair()
    given, number, ticket = prompt(40), two.number(), two.ticket()
    assert two.decode.ask(given[:16], 1).tokens
    token = publish(two, given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    asked = two.decode.ask((*given, token), 4, number)
    assert (len(asked.tokens), asked.request.matched_tokens) == (4, 24)
    two.decode.wait_empty()


@pytest.mark.parametrize("change", ["another prompt", "two tokens more", "a token less"])
def test_kv_of_another_prompt_is_never_used(pair: Build, change: str) -> None:
    two = pair()
    given, number, ticket = prompt(40), two.number(), two.ticket()
    token = publish(two, given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    wrong = {
        "another prompt": (*prompt(40), token),
        "two tokens more": (*given, token, token),
        "a token less": given[:-1],
    }[change]
    asked = two.decode.ask(wrong, 4, number)
    assert (len(asked.tokens), asked.request.matched_tokens) == (4, 0)
    assert "read another prompt" in two.decode.reports[-1]["problem"]
    two.decode.wait_empty()


def test_what_nobody_means_to_ask_for_is_not_kept(pair: Build) -> None:
    two = pair()
    number, ticket = two.number(), two.ticket()
    publish(two, prompt(20), number, ticket)
    status, said = question(two, number, ticket)
    assert status == 409
    assert "no opening here" in said["problem"]


def test_it_is_told_once_and_to_the_handoffs_own_ticket(pair: Build) -> None:
    two = pair()
    number, ticket = two.number(), two.ticket()
    publish(two, prompt(20), number, ticket, opening=True)
    assert question(two, number, two.ticket())[0] == 409
    assert question(two, number, ticket[:-6] + "AAAAAA")[0] == 403
    assert question(two, number, ticket)[0] == 200
    assert question(two, number, ticket)[0] == 409
    two.prefill.wait_empty()


def test_the_answer_may_be_asked_for_before_the_engine_is_done(pair: Build) -> None:
    two = pair()
    given, number, ticket = prompt(20), two.number(), two.ticket()
    side = two.prefill.scheduler.side
    known = threading.Event()
    finished = side.finished

    def late(request_id: int, tokens) -> None:
        known.wait(5.0)
        time.sleep(0.05)
        finished(request_id, tokens)

    side.finished = late
    said = {"version": 1, "step": "prefill", "request_id": number, "ticket": ticket}
    assert two.prefill.announce({**said, "opening": True}) == (200, {})
    asked = two.prefill.ask(given, 1, number)
    end_s = time.monotonic() + 5.0
    while not len(side._openings):
        assert time.monotonic() < end_s
        time.sleep(0.001)
    known.set()
    assert question(two, number, ticket)[1]["token"] == asked.tokens[0]


# What keeps them


def kept(count: int = 1, **more: object) -> Openings:
    this = Openings()
    for number in range(count):
        this.expect(number, "h", [1, 2], float(more.get("expires_s", 10.0)))
    return this


@pytest.mark.parametrize("tokens", [[1, 2], [], [1, 3, 4], [2, 1, 5]])
def test_an_engine_that_tells_other_tokens_is_not_believed(tokens: list[int]) -> None:
    this = kept()
    this.finished(0, lambda: tokens)
    with pytest.raises(LocalProtocolError, match="did not tell"):
        this.take(0, "h")
    assert len(this) == 0


def test_an_engine_that_fails_to_tell_leaves_nobody_waiting() -> None:
    this = kept()
    with pytest.raises(ZeroDivisionError):
        this.finished(0, lambda: 1 // 0)
    with pytest.raises(LocalProtocolError, match="did not tell"):
        this.take(0, "h")


def test_a_request_that_does_not_end_is_waited_for_a_while(monkeypatch) -> None:
    monkeypatch.setattr(openings, "WAIT_S", 0.02)
    this = kept()
    with pytest.raises(LocalProtocolError, match=r"not over after 0\.02 s"):
        this.take(0, "h")
    assert len(this) == 0


def test_what_nobody_asks_for_is_forgotten_with_its_ticket() -> None:
    this = kept(expires_s=5.0)
    this.sweep(4.0)
    assert len(this) == 1
    this.sweep(6.0)
    assert len(this) == 0


def test_their_number_and_length_are_bounded() -> None:
    this = kept(MOST + 5)
    assert len(this) == MOST
    this.expect(9999, "h", range(MAX_PROMPT_TOKENS + 1), 10.0)
    assert len(this) == MOST
    with pytest.raises(LocalProtocolError):
        this.take(9999, "h")


def test_a_request_that_ends_twice_keeps_its_first_token() -> None:
    this = kept()
    this.finished(0, lambda: [1, 2, 7])
    this.finished(0, lambda: [1, 2, 8])
    assert this.take(0, "h") == ([1, 2], 7)
