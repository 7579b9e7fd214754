"""What the gateway says to SGLang workers, and what it believes of their answers."""

from __future__ import annotations

import pytest

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.dialect import Body, HandoffRef, Published, pair_family, tells_endpoints
from disagg_plugins.types import HandoffId, Role, Worker
from disagg_sglang.dialect import KEYS, ROOM_KEYS, SglangDialect
from disagg_sglang.room import Room, unpack_room

ENDPOINT = {"tp_rank": 0, "tp_size": 1, "host_id": "h", "addresses": {"shm": "@a"}}
ELSEWHERE = {**ENDPOINT, "host_id": "elsewhere"}
REF = HandoffRef(
    HandoffId("f0112233445566778899aabbccddeeff"),
    "ticket",
    Worker("p0", "http://127.0.0.1:8101", "sglang", Role.PREFILL),
    Worker("d0", "http://127.0.0.1:8102", "sglang", Role.DECODE),
    (ENDPOINT,),
)
BODY: Body = {
    "model": "m",
    "prompt": "hello",
    "max_tokens": 64,
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": 3,
    "temperature": 0.5,
    "a_field_nobody_knows": {"x": [1]},
}
SET_BY_CLIENT: Body = {
    "bootstrap_host": "evil",
    "bootstrap_port": 1,
    "bootstrap_room": 2,
    "routed_dp_rank": 3,
    "disagg_prefill_dp_rank": 4,
    "data_parallel_rank": 5,
}


def room_of(body: Body) -> Room:
    host = body["bootstrap_host"]
    assert isinstance(host, str)
    return unpack_room(host)


def without_room(body: Body) -> Body:
    return {k: v for k, v in body.items() if k not in ROOM_KEYS}


def test_prefill_is_asked_for_an_answer_that_nobody_streams() -> None:
    body = SglangDialect().prefill_body(BODY, REF)
    assert body["stream"] is False
    assert "stream_options" not in body
    assert body["max_tokens"] == 64, "SGLang's prefill worker ends after one token by itself"
    assert body["a_field_nobody_knows"] == {"x": [1]}
    assert BODY["stream"] is True, "the client's body is left as it is"


def test_decode_gets_the_clients_request_as_it_is() -> None:
    assert without_room(SglangDialect().decode_body(BODY, REF, None)) == BODY
    assert "bootstrap_host" not in BODY


def test_both_workers_meet_in_the_room_of_the_handoff() -> None:
    dialect = SglangDialect()
    prefill, decode = dialect.prefill_body(BODY, REF), dialect.decode_body(BODY, REF, None)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"] == REF.room
    assert 0 < REF.room < 1 << 63
    assert room_of(prefill) == Room("ticket")
    assert room_of(decode) == Room("ticket", [ENDPOINT])


def test_decode_is_told_what_another_engine_published() -> None:
    published = Published(9, (ELSEWHERE,), first_token=17)
    body = SglangDialect().decode_body(BODY, REF, published)
    assert room_of(body) == Room("ticket", [ELSEWHERE], 17)


def test_decode_of_two_sglang_workers_reads_the_first_token_with_the_kv() -> None:
    dialect = SglangDialect()
    published = dialect.published({"usage": {"prompt_tokens": 9}}, REF)
    assert room_of(dialect.decode_body(BODY, REF, published)).first_token == -1


def test_an_answer_of_sglang_says_how_long_the_prompt_is() -> None:
    answer: Body = {
        "id": "x",
        "choices": [{"index": 0, "text": " a", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 9, "total_tokens": 10, "completion_tokens": 1},
    }
    assert SglangDialect().published(answer, REF) == Published(9, (ENDPOINT,))


@pytest.mark.parametrize(
    "usage",
    [None, [], {}, {"prompt_tokens": 0}, {"prompt_tokens": True}, {"prompt_tokens": "9" * 999}],
)
def test_an_answer_that_does_not_say_so_is_refused(usage: object) -> None:
    with pytest.raises(RemoteProtocolError, match="prompt_tokens") as caught:
        SglangDialect().published({"choices": [], "usage": usage}, REF)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", KEYS)
def test_what_reaches_the_kv_path_makes_a_request_unsplittable(key: str) -> None:
    dialect = SglangDialect()
    assert dialect.unsplittable({**BODY, key: SET_BY_CLIENT[key]}) == f"the client set {key}"
    assert dialect.unsplittable({**BODY, key: [SET_BY_CLIENT[key]]}) == f"the client set {key}"
    assert dialect.unsplittable({**BODY, key: None}) is None


def test_a_client_never_reaches_the_kv_path() -> None:
    dialect = SglangDialect()
    body = {**BODY, **SET_BY_CLIENT}
    assert dialect.local_body(body) == BODY
    for split in (dialect.prefill_body(body, REF), dialect.decode_body(body, REF, None)):
        assert set(split) & set(KEYS) == {"bootstrap_host", "bootstrap_room"}
        assert room_of(split).ticket == "ticket"
        assert split["bootstrap_room"] == REF.room


@pytest.mark.parametrize("key", KEYS)
def test_a_field_set_to_null_is_taken_out_too(key: str) -> None:
    assert SglangDialect().local_body({**BODY, key: None}) == BODY


def test_a_clean_body_is_passed_as_it_is() -> None:
    assert SglangDialect().local_body(BODY) is BODY


def test_unsplittable_names_the_reason() -> None:
    dialect = SglangDialect()
    assert dialect.unsplittable(BODY) is None
    assert dialect.unsplittable({**BODY, "n": 2}) == "n > 1"


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_log_probabilities_do_not_go_on_from_another_engines_token(asked: Body, key: str) -> None:
    reason = SglangDialect().unsplittable_across(asked)
    assert reason is not None
    assert reason.startswith(f"{key} of a first token")


@pytest.mark.parametrize("key", ["regex", "ebnf", "json_schema"])
def test_what_only_sglang_obeys_is_not_left_to_another_engines_first_token(key: str) -> None:
    reason = SglangDialect().unsplittable_across({key: "x"})
    assert reason is not None
    assert reason.startswith(key)


@pytest.mark.parametrize(
    "asked", [{}, {"logprobs": None}, {"logprobs": False, "top_logprobs": None}]
)
def test_anything_else_goes_on_from_another_engines_token(asked: Body) -> None:
    assert SglangDialect().unsplittable_across(asked) is None


class Other(SglangDialect):
    engine = "other"


def test_two_sglang_workers_meet_at_once_and_two_engines_by_relay() -> None:
    sglang, other = SglangDialect(), Other()
    assert pair_family(sglang, sglang) == "rendezvous"
    assert pair_family(sglang, other) == pair_family(other, sglang) == "relay"
    assert not tells_endpoints(sglang, other), "SGLang's endpoints come with its hello"


def test_a_lora_adapter_is_never_split() -> None:
    assert "LoRA" in str(SglangDialect().unsplittable({**BODY, "lora_path": "mine"}))


def test_a_server_is_told_its_role_and_has_no_mode_for_both() -> None:
    dialect = SglangDialect()
    assert dialect.role_switch(Role.PREFILL) == ("/pd_role_switch", {"new_role": "prefill"})
    path, body = dialect.role_switch(Role.DECODE) or ("", {})
    assert (path, body["new_role"]) == ("/pd_role_switch", "decode")
    assert body["decode_cuda_graph_memory_gb"] == 0  # SGLang refuses decode without it
    assert dialect.role_switch(Role.BOTH) is None
