"""Decode goes on from the token that prefill wrote, where two answers can be put together."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from disagg_plugins import hookimpl
from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway import resumption
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_plugins.testing.tokens import Tokens, prompt_ids
from disagg_trtllm.announcements import Announcement, Announcements
from disagg_trtllm.dialect import TrtllmDialect
from tests.gateway.harness import LONG, SHORT, Stack, build_stack, eventually

SEED = zlib.crc32(msgspec.json.encode(LONG))
PROMPT = prompt_ids(SEED, len(msgspec.json.encode(LONG)) // 4)
TOKEN = Tokens(SEED, []).id(0)
TEXT = Tokens(SEED, []).text(0)


class Dialect(TrtllmDialect):
    engine = "vllm"  # what fake engines are called
    answers_endpoints = True  # nobody greets with those of their ranks

    def announcement(self, step, ref, published) -> dict[str, Any]:
        told = {"version": 1, "step": step, "request_id": ref.room | 1 << 40, "ticket": ref.ticket}
        if step == "decode":
            told |= {"num_tokens": published.num_tokens, "prompt": "", "endpoints": [{}]}
        return told


class Plugin:
    @hookimpl
    def disagg_register_dialects(self) -> list[object]:
        return [Dialect()]


class Site:
    """A gateway that knows how tokens are spelled, two engines, and what their adapters say."""

    def __init__(self, stack: ExitStack, folder: Path, spell: object, **more: Any) -> None:
        self.heard: list[Announcement] = []
        self.told: object = {"prompt": PROMPT, "token": TOKEN}
        self.refuses = self.hangs = False
        self.stack: Stack = build_stack(stack, folder, dialects=Plugin(), **more)
        self.stack.gateway.prompts.counter = SimpleNamespace(
            spell=spell, prepare=lambda parsed: None, close=lambda: None
        )
        self.listener = Announcements("127.0.0.1", self._hear)
        stack.callback(self.listener.close)
        fleet = self.stack.gateway.fleet
        for name in ("p0", "d0"):
            self.stack.call(
                lambda name=name: fleet.greet(name, {"announce": self.listener.address})
            )
            eventually(lambda name=name: fleet.announce_address(name), "it is known")

    def _hear(self, said: Announcement) -> Any:
        self.heard.append(said)
        if said.step != "opening":
            return {}
        if self.hangs:
            eventually(lambda: not self.hangs, "it is let go")
        if self.refuses:
            raise LocalProtocolError("no such request")
        return self.told

    @property
    def steps(self) -> list[str]:
        return [said.step for said in self.heard]

    @property
    def given(self) -> Any:
        """What the decode worker was given last."""
        return self.stack.engines["d0"].seen.bodies[-1]

    def text(self, answer: bytes) -> str:
        return json.loads(answer)["choices"][0]["text"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:

        def build(spell: object = lambda token: TEXT if token == TOKEN else "?", **more: Any):
            return Site(stack, tmp_path, spell, **more)

        yield build


def right(count: int = 4) -> str:
    return "".join(Tokens(SEED, []).text(i) for i in range(count))


def test_decode_gets_prompt_and_first_token_and_the_client_the_whole(site) -> None:
    two = site()
    status, answer = two.stack.complete()
    assert (status, two.text(answer)) == (200, right())
    assert two.steps == ["prefill", "opening", "decode"]
    assert two.heard[0].opening
    assert (two.given["prompt"], two.given["max_tokens"]) == ([*PROMPT, TOKEN], 3)
    assert two.given["disaggregated_params"]["request_type"] == "context_and_generation"
    usage = json.loads(answer)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 4)
    (record,) = two.stack.records(1)
    assert (record["prompt_tokens"], record["output_tokens"]) == (len(PROMPT), 4)
    assert record["failures"] == []
    two.stack.wait_idle()


def test_a_stream_is_put_together_and_its_usage_too(site) -> None:
    two = site()
    options = {"include_usage": True}
    _, answer = two.stack.complete(stream=True, stream_options=options)
    said = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    assert "".join(c["text"] for e in said for c in e["choices"]) == right()
    assert answer.count(b"[DONE]") == 1
    usage = said[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 4)
    (record,) = two.stack.records(1)
    assert (record["prompt_tokens"], record["output_tokens"]) == (len(PROMPT), 4)
    two.stack.wait_idle()


WHOLE_TEXT = [
    {"stop": ["x"]}, {"seed": 1}, {"logprobs": 0}, {"presence_penalty": 0.1}, {"min_tokens": 2},
    {"max_tokens": 1}, {"max_tokens": None}, {"guided_regex": "a"}, {"return_token_ids": True},
    {"logit_bias": {"5": 1}}, {"repetition_penalty": 1.0}, {"skip_special_tokens": False},
]  # fmt: skip


@pytest.mark.parametrize("more", WHOLE_TEXT, ids=lambda more: next(iter(more)))
def test_what_looks_at_the_whole_answer_is_decoded_from_the_prompt(site, more) -> None:
    two = site()
    assert two.stack.complete(**more)[0] == 200
    assert two.steps == ["prefill", "decode"]
    assert not two.heard[0].opening
    assert two.given["prompt"] == LONG


NOTHING = {
    "stop": None, "seed": None, "logprobs": None, "n": 1, "best_of": 1, "echo": False,
    "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "temperature": 0.7,
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_no_hindrance(site) -> None:
    two = site()
    assert two.text(two.stack.complete(**NOTHING)[1]) == right()
    assert "opening" in two.steps


def test_chats_are_decoded_from_their_messages(site) -> None:
    two = site()
    body = {"model": "fake-model", "max_tokens": 4, "messages": [{"role": "user", "content": LONG}]}
    assert two.stack.request("POST", "/v1/chat/completions", body)[0] == 200
    assert two.steps == ["prefill", "decode"]


def test_without_a_tokenizer_whose_texts_join_nobody_asks(site) -> None:
    two = site(spell=None)
    assert two.stack.complete()[0] == 200
    assert two.steps == ["prefill", "decode"]


FALSE = [
    None, [], {}, {"prompt": PROMPT}, {"prompt": PROMPT[:-1], "token": TOKEN},
    {"prompt": PROMPT, "token": -1}, {"prompt": PROMPT, "token": True},
    {"prompt": [*PROMPT[:-1], 1.5], "token": TOKEN}, {"prompt": "x", "token": TOKEN},
    {"prompt": PROMPT, "token": TOKEN + 1}, {"prompt": PROMPT, "token": 1 << 40},
    {"prompt": [1 << 70, *PROMPT[1:]], "token": TOKEN},
]  # fmt: skip


@pytest.mark.parametrize("told", FALSE, ids=range(len(FALSE)))
def test_what_cannot_be_is_not_believed(site, told) -> None:
    two = site()
    two.told = told
    assert two.stack.complete()[0] == 200
    assert two.steps == ["prefill", "opening", "decode"]
    assert two.given["prompt"] == LONG
    assert two.stack.records(1)[0]["failures"] == []


def test_an_adapter_that_does_not_know_leaves_the_prompt_to_decode(site) -> None:
    two = site()
    two.refuses = True
    assert two.stack.complete()[0] == 200
    assert two.given["prompt"] == LONG
    two.stack.wait_idle()


@pytest.mark.parametrize("text", ["", "\ufffd"])
def test_a_first_token_without_a_text_of_its_own_is_written_anew(site, text: str) -> None:
    two = site(spell=lambda token: text)
    assert two.stack.complete()[0] == 200
    assert two.given["prompt"] == LONG


def test_an_adapter_that_hangs_costs_no_more_than_prefill_may(site) -> None:
    two = site(gateway={"prefill_s": 0.5})
    two.hangs = True
    assert two.stack.complete()[0] == 200
    (failure,) = two.stack.records(1)[0]["failures"]
    assert (failure["side"], failure["kind"]) == ("prefill", "timeout")
    two.stack.wait_idle()
    two.hangs = False


def test_a_client_that_goes_meanwhile_leaves_nothing(site) -> None:
    two = site()
    two.hangs = True
    body = b'{"model": "fake-model", "prompt": "%s", "max_tokens": 4}' % LONG.encode()
    sock = two.stack.raw(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    eventually(lambda: "opening" in two.steps, "it is asked")
    sock.close()
    two.stack.wait_idle()
    two.hangs = False
    assert two.stack.engines["d0"].seen.requests == 0


FAULTS = [Behaviour(status=500, times=1), Behaviour(status=400, times=1),
          Behaviour(close="head", times=1), Behaviour(garbage="body", times=1),
          Behaviour(error_event=500, times=1)]  # fmt: skip


@pytest.mark.parametrize("how", FAULTS, ids=["500", "400", "closed", "garbage", "error event"])
@pytest.mark.parametrize("stream", [False, True])
def test_decode_that_fails_is_asked_anew_for_all_of_it(site, how, stream) -> None:
    two = site(gateway={"retry_share": 1.0})
    two.stack.engines["d0"].behaviour = how
    status, answer = two.stack.complete(stream=stream)
    assert status == 200
    if stream:
        said = [json.loads(x[6:]) for x in answer.splitlines() if x.startswith(b"data: {")]
        assert "".join(c["text"] for e in said for c in e["choices"]) == right()
    else:
        assert two.text(answer) == right()
    two.stack.wait_idle()


def test_long_answers_cost_no_second_call_and_no_blame(site, monkeypatch) -> None:
    monkeypatch.setattr(resumption, "MAX_WHOLE_BYTES", 1 << 10)
    two = site(gateway={"retry_share": 0.0, "retries_per_s": 0.0})
    status, answer = two.stack.complete(max_tokens=1_000)
    assert (status, two.text(answer)) == (200, right(1_000))
    assert two.stack.engines["d0"].seen.requests == 1
    (record,) = two.stack.records(1)
    assert record["failures"] == []


def test_a_stream_whose_worker_read_another_prompt_does_not_end_well(site) -> None:
    two = site()
    two.stack.engines["d0"].behaviour = Behaviour(more_read=1)
    with pytest.raises(IncompleteRead) as broken:
        two.stack.complete(stream=True, stream_options={"include_usage": True})
    assert b"tokens, not the" in broken.value.partial
    assert b"[DONE]" not in broken.value.partial
    (record,) = two.stack.records(1)
    assert record["outcome"] == "broken"
    assert [f["worker"] for f in record["failures"]] == ["d0"]
    two.stack.wait_idle()


@pytest.mark.parametrize(("count", "steps"), [(2, 0), (3, 1), (5, 3)])
def test_the_time_a_token_is_that_of_those_after_the_first_piece(site, count, steps) -> None:
    """The first two tokens go out together."""
    two = site()
    two.stack.engines["d0"].behaviour = Behaviour(chunk_s=0.05)
    two.stack.complete(stream=True, max_tokens=count, stream_options={"include_usage": True})
    (record,) = two.stack.records(1)
    assert record["output_tokens"] == count
    if not steps:
        assert record["tpot_s"] is None
    else:
        assert record["itl"]["count"] == steps
        assert record["itl"]["p50_s"] / 2 < record["tpot_s"] <= record["itl"]["max_s"] + 1e-6


def test_short_prompts_are_none_of_this(site) -> None:
    two = site()
    assert two.stack.complete(SHORT)[0] == 200
    assert two.steps == []
