"""What the gateway says to vLLM workers, and what it believes of their answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from disagg_plugins.engine.params import answer_params, read_params
from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.body import read_body
from disagg_plugins.gateway.dialect import Body, HandoffRef, Published, pair_family, tells_endpoints
from disagg_plugins.types import HandoffId, Role, Worker
from disagg_vllm.dialect import KEY, TOKEN_IDS, VllmDialect

REF = HandoffRef(
    HandoffId("00112233445566778899aabbccddeeff"),
    "ticket",
    Worker("p0", "http://127.0.0.1:8101", "vllm", Role.PREFILL),
    Worker("d0", "http://127.0.0.1:8102", "vllm", Role.DECODE),
)
BODY: Body = {
    "model": "m",
    "prompt": "hello",
    "max_tokens": 64,
    "stream": True,
    "stream_options": {"include_usage": True},
    "min_tokens": 5,
    "logprobs": 3,
    "temperature": 0.5,
    "a_field_nobody_knows": {"x": [1]},
}
ENDPOINT = {"tp_rank": 0, "tp_size": 1, "host_id": "h", "addresses": {"shm": "a"}}
PUBLISHED = Published(9, (ENDPOINT,))


def answer(**changes: object) -> Body:
    record = {"version": 1, "num_tokens": 9, "endpoints": [ENDPOINT], **changes}
    return {"choices": [], KEY: {"disagg": record, "remote_prefill_cached_tokens": 4}}


def test_prefill_asks_for_one_token_that_nobody_sees() -> None:
    body = VllmDialect().prefill_body(BODY, REF)
    assert body["stream"] is False
    assert body["max_tokens"] == 1
    assert not {"stream_options", "logprobs"} & set(body)
    assert body["min_tokens"] == 1, "the first token may not be one that ends the answer"
    assert body["temperature"] == 0.5
    assert body["a_field_nobody_knows"] == {"x": [1]}
    assert BODY["stream"] is True, "the client's body is left as it is"


def test_a_clients_body_is_read_as_it_comes() -> None:
    body = read_body(b'{"prompt": "x", "max_tokens": 24, "min_tokens": 20, "logprobs": 1}')
    assert VllmDialect().prefill_body(body, REF)["min_tokens"] == 1


def test_prefill_bounds_the_newer_field_too() -> None:
    body = VllmDialect().prefill_body({**BODY, "max_completion_tokens": 50}, REF)
    assert body["max_completion_tokens"] == 1
    assert "max_completion_tokens" not in VllmDialect().prefill_body(BODY, REF)


def test_the_connector_reads_what_the_dialect_writes() -> None:
    dialect = VllmDialect()
    prefill = read_params(dialect.prefill_body(BODY, REF)[KEY])
    assert prefill is not None
    assert (prefill.step, prefill.ticket) == ("prefill", "ticket")
    said = {KEY: answer_params(num_tokens=9, prompt="a" * 32, endpoints=[ENDPOINT])}
    decode = read_params(dialect.decode_body(BODY, REF, dialect.published(said, REF))[KEY])
    assert decode is not None
    assert (decode.step, decode.ticket, decode.num_tokens) == ("decode", "ticket", 9)
    assert decode.endpoints == (ENDPOINT,)


def test_decode_gets_the_clients_request_and_the_opaque_params() -> None:
    dialect = VllmDialect()
    body = dialect.decode_body(BODY, REF, dialect.published(answer(), REF))
    assert {k: v for k, v in body.items() if k != KEY} == BODY
    params = body[KEY]
    assert isinstance(params, dict)
    assert params["remote_prefill_cached_tokens"] == 4


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"choices": []}, "does not happen"),
        ({KEY: None}, "does not happen"),
        ({KEY: {"do_remote_prefill": True}}, "does not happen"),
        ({KEY: {"disagg": []}}, "does not happen"),
        (answer(version=2), "version 2"),
        (answer(num_tokens=0), "num_tokens 0"),
        (answer(num_tokens=True), "num_tokens True"),
        (answer(endpoints=[]), "no endpoint"),
        (answer(endpoints="x"), "no endpoint"),
    ],
)
def test_false_handoff_params_are_refused(said: Body, words: str) -> None:
    with pytest.raises(RemoteProtocolError, match=words):
        VllmDialect().published(said, REF)


@pytest.mark.parametrize(
    "given",
    [
        {KEY: {"disagg": {"step": "decode", "ticket": "forged"}}},
        {KEY: {"do_remote_prefill": True}, "vllm_xargs": {KEY: {"x": 1}}},
        {"vllm_xargs": {KEY: {"disagg": {}}}},
    ],
)
def test_a_client_never_reaches_the_kv_path(given: Body) -> None:
    dialect = VllmDialect()
    body = {**BODY, **given}
    for clean in (
        dialect.local_body(body),
        {k: v for k, v in dialect.prefill_body(body, REF).items() if k != KEY},
        {k: v for k, v in dialect.decode_body(body, REF, PUBLISHED).items() if k != KEY},
    ):
        assert KEY not in str(clean)


def test_a_clean_body_is_passed_as_it_is() -> None:
    assert VllmDialect().local_body(BODY) is BODY


def test_unsplittable_names_the_reason() -> None:
    dialect = VllmDialect()
    assert dialect.unsplittable(BODY) is None
    assert dialect.unsplittable({**BODY, "n": 2}) == "n > 1"
    assert dialect.unsplittable({**BODY, KEY: {}}) == f"the client set {KEY}"


class Other(VllmDialect):
    engine = "other"
    answers_endpoints = False


def test_workers_of_two_engines_meet_by_relay() -> None:
    vllm, other = VllmDialect(), Other()
    other.family = "rendezvous"
    assert pair_family(vllm, vllm) == "relay"
    assert pair_family(other, other) == "rendezvous"
    assert pair_family(vllm, other) == pair_family(other, vllm) == "relay"
    assert tells_endpoints(vllm, other)
    assert not tells_endpoints(other, vllm)
    assert not tells_endpoints(other, other)


def test_another_engine_is_told_the_first_token() -> None:
    ref = replace(REF, decode=Worker("d0", "http://127.0.0.1:8102", "other", Role.DECODE))
    dialect = VllmDialect()
    assert dialect.prefill_body(BODY, ref)[TOKEN_IDS] is True
    assert TOKEN_IDS not in dialect.prefill_body(BODY, REF)
    said = {**answer(), "choices": [{"token_ids": [17]}]}
    assert dialect.published(said, ref).first_token == 17
    assert dialect.published(said, REF).first_token == -1


@pytest.mark.parametrize("choices", [[], [{}], [{"token_ids": []}], [{"token_ids": [1, 2]}], "x"])
def test_an_answer_without_its_token_is_refused_across_engines(choices: object) -> None:
    ref = replace(REF, decode=Worker("d0", "http://127.0.0.1:8102", "other", Role.DECODE))
    with pytest.raises(RemoteProtocolError, match="cannot go on"):
        VllmDialect().published({**answer(), "choices": choices}, ref)


def test_room_is_a_positive_number() -> None:
    assert 0 < REF.room < 1 << 63
    assert REF.address == "127.0.0.1:8101"


def test_an_adapter_that_only_the_other_engine_knows_is_not_split() -> None:
    assert VllmDialect().unsplittable_across({**BODY, "logprobs": 3}) is None
    assert VllmDialect().unsplittable_across({**BODY, "lora_path": "a"}) is not None
