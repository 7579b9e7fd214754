"""A real SGLang prefill worker and a real SGLang decode worker, against SGLang unsplit.

The tests run in the order of this file against one fleet; the last ones kill parts of it. The
unsplit SGLang has the role ``both``: what cannot be split is served there, and it is what the split
is compared with.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import time
from contextlib import closing
from typing import Any

import pytest

from disagg_kv_tcp.transport import TcpTransport
from disagg_plugins.errors import AuthenticationError
from disagg_plugins.handoff.endpoints import local_host_id
from disagg_plugins.handoff.interfaces import Endpoint
from disagg_plugins.handoff.tickets import new_handoff_id
from disagg_plugins.testing.handoffs import Opened, RecordingSink, World
from tests import parity
from tests.corpus import prompts
from tests.engines.client import AnswerError, Completion, complete
from tests.engines.probes import engine_processes, idle, in_flight, metric, post, until
from tests.engines.resetter import Resetter
from tests.engines.sglang_bed import LEASE_S, by_hand, endpoints_of, select, ticket_of
from tests.engines.testbed import MODEL_NAME, Testbed, free_ports

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

BYTES_A_TOKEN = 2 * 30 * 3 * 64 * 4
"""K and V, 30 layers, 3 KV heads of 64 elements of 4 bytes."""


@pytest.fixture(scope="module", autouse=True)
def sglang_alone(bed: Testbed) -> None:
    select(bed, "prefill", "decode", "whole")


def text_of(tokens: int, seed: int) -> str:
    return next(prompts([tokens], seed=seed))


def split(bed: Testbed, prompt: str | list[int], max_tokens: int, **more: Any) -> Completion:
    more.setdefault("logprobs", None)
    return complete(bed.gateway_url, prompt, max_tokens=max_tokens, model=MODEL_NAME, **more)


def whole(bed: Testbed, prompt: str | list[int], max_tokens: int, **more: Any) -> Completion:
    more.setdefault("logprobs", None)
    return complete(bed.urls["whole"], prompt, max_tokens=max_tokens, model=MODEL_NAME, **more)


@pytest.mark.parametrize("tokens", [20, 300, 1100])
def test_answers_are_those_of_sglang_unsplit(bed: Testbed, tokens: int) -> None:
    text = text_of(tokens, seed=tokens)
    answer = split(bed, text, 32, logprobs=2)
    assert parity.compare(answer, whole(bed, text, 32, logprobs=2)) != "different"
    # Once more: prefill has it in its cache now.
    again = split(bed, text, 32, logprobs=2)
    assert parity.compare(again, answer) != "different"


def test_the_first_tokens_logprobs_come_along(bed: Testbed) -> None:
    text = text_of(200, seed=5)
    ours, theirs = (send(bed, text, 4, logprobs=2) for send in (split, whole))
    assert ours.tokens == theirs.tokens
    for a, b in zip(ours.top, theirs.top, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


def test_a_cold_prompt_is_loaded_whole(bed: Testbed) -> None:
    answer = split(bed, text_of(500, seed=11), 8, request_id="whole")
    record = parity.record_of(bed, "whole")
    handoff, prompt_tokens = record["handoff"], answer.usage["prompt_tokens"]
    assert record["route"] == "disaggregated"
    assert record["split"] == "yes"
    assert (record["prefill"], record["decode"]) == ("prefill", "decode")
    assert handoff["outcome"] == "consumed"
    assert handoff["published_tokens"] == prompt_tokens
    # Texts that begin alike share a token or two, which the decode worker has in its cache.
    assert handoff["tokens_local"] < 10
    assert handoff["tokens_loaded"] == prompt_tokens - handoff["tokens_local"]
    assert handoff["tokens_recomputed"] == 0
    assert handoff["bytes"] == handoff["tokens_loaded"] * BYTES_A_TOKEN
    assert (handoff["transport"], handoff["form"]) == ("shm", "native")


def test_only_what_the_decode_workers_cache_lacks_is_moved(bed: Testbed) -> None:
    text = text_of(700, seed=12)
    split(bed, text[: len(text) // 2], 8)
    answer = split(bed, text, 8, request_id="partly")
    handoff = parity.record_of(bed, "partly")["handoff"]
    assert handoff["tokens_local"] > 200
    assert handoff["tokens_loaded"] == answer.usage["prompt_tokens"] - handoff["tokens_local"]
    assert handoff["bytes"] == handoff["tokens_loaded"] * BYTES_A_TOKEN
    assert answer.tokens == whole(bed, text, 8).tokens


def test_a_prompt_that_decode_has_already_needs_only_its_first_token(bed: Testbed) -> None:
    text = text_of(300, seed=13)
    first = split(bed, text, 8)
    again = split(bed, text, 8, request_id="again")
    assert again.tokens == first.tokens
    assert parity.record_of(bed, "again")["handoff"]["bytes"] <= 2 * BYTES_A_TOKEN


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_answers_like_sglang_unsplit_and_usage_is_right(bed: Testbed, stream: bool) -> None:
    message = "Summarise this:\n" + text_of(300, seed=14)
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": 16,
        "temperature": 0,
    }
    _, expected = post(bed.urls["whole"], "/v1/chat/completions", body)
    text, usage = expected["choices"][0]["message"]["content"], expected["usage"]
    if not stream:
        code, answer = post(bed.gateway_url, "/v1/chat/completions", body)
        assert code == 200
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["usage"]["prompt_tokens"] == usage["prompt_tokens"]
        assert answer["usage"]["completion_tokens"] == usage["completion_tokens"]
        return
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = stream_of(bed, "/v1/chat/completions", body | options)
    said = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    assert said == text
    assert events[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]


def connect(bed: Testbed, path: str, body: dict[str, Any], name: str = "") -> Any:
    host, port = bed.gateway_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
    connection.request("POST", path, json.dumps(body), headers)
    return connection


def stream_of(bed: Testbed, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    connection = connect(bed, path, body)
    lines = list(connection.getresponse())
    connection.close()
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 1},
        {"max_tokens": 24, "stop": ["\n"]},
        {"max_tokens": 24, "presence_penalty": 1.5},
        {"max_tokens": 24, "min_tokens": 20, "ignore_eos": False},
    ],
)
def test_what_ends_or_bends_an_answer_holds_across_the_split(
    bed: Testbed, more: dict[str, Any]
) -> None:
    body = {"model": MODEL_NAME, "prompt": text_of(150, seed=15), "temperature": 0, **more}
    ours, theirs = (
        post(url, "/v1/completions", body)[1] for url in (bed.gateway_url, bed.urls["whole"])
    )
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert ours["choices"][0]["finish_reason"] == theirs["choices"][0]["finish_reason"]
    assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"]


def test_sampled_answers_are_of_the_asked_length(bed: Testbed) -> None:
    more = {"temperature": 0.9, "seed": 7, "top_p": 0.9}
    assert split(bed, text_of(150, seed=16), 12, extra=more).usage["completion_tokens"] == 12


def test_what_cannot_be_split_is_served_by_the_worker_for_both(bed: Testbed) -> None:
    body = {"model": MODEL_NAME, "prompt": text_of(200, seed=17), "max_tokens": 4, "n": 2}
    code, answer = post(bed.gateway_url, "/v1/completions", body, "two")
    assert code == 200
    assert len(answer["choices"]) == 2
    record = parity.record_of(bed, "two")
    assert (record["route"], record["decode"]) == ("local", "whole")
    assert "n > 1" in record["why"]


def test_requests_at_once_are_all_right(bed: Testbed) -> None:
    texts = list(prompts([150, 250, 350, 450, 550, 120], seed=18))
    expected = [whole(bed, text, 12, logprobs=2) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: split(bed, text, 12, logprobs=2), texts))
    verdicts = [parity.compare(a, b) for a, b in zip(answers, expected, strict=True)]
    # Batching changes roundings; a difference beyond a tie would be wrong KV.
    assert verdicts.count("different") == 0


def test_a_wrong_request_gets_sglangs_own_answer(bed: Testbed) -> None:
    long = {"model": MODEL_NAME, "prompt": [5] * 4000, "max_tokens": 4}
    code, answer = post(bed.gateway_url, "/v1/completions", long)
    assert code == 400
    assert "2048" in answer["message"]


@pytest.mark.parametrize("after_chunks", [0, 3])
def test_a_client_that_goes_away_stops_the_work_on_both_sides(
    bed: Testbed, after_chunks: int
) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": text_of(900, seed=19 + after_chunks),
        "max_tokens": 800,
        "ignore_eos": True,
        "stream": True,
    }
    name = f"gone-{after_chunks}"
    connection = connect(bed, "/v1/completions", body, name)
    if after_chunks:
        answer = connection.getresponse()
        for _ in range(2 * after_chunks):
            answer.readline()
        answer.close()
    else:
        until(lambda: in_flight(bed, "prefill") > 0, "the prefill")
    connection.close()
    if connection.sock is not None:
        connection.sock.close()
    until(lambda: idle(bed), "both workers to be idle")
    assert parity.record_of(bed, name)["client_gone"]
    assert split(bed, "Still there?", 4).usage["completion_tokens"] == 4


# One half by hand: what no gateway would send ------------------------------------------------


def test_kv_of_another_prompt_of_the_same_length_is_never_used(bed: Testbed) -> None:
    handoff_id = new_handoff_id()
    assert by_hand(bed, "prefill", [11] * 300, handoff_id)[0] == 200
    endpoints = endpoints_of(bed)
    code, answer = by_hand(bed, "decode", [13] * 300, handoff_id, endpoints=endpoints)
    assert code == 500
    assert "another prompt" in json.dumps(answer)


def test_a_handoff_is_taken_once(bed: Testbed) -> None:
    handoff_id, endpoints = new_handoff_id(), endpoints_of(bed)
    assert by_hand(bed, "prefill", [17] * 300, handoff_id)[0] == 200
    assert by_hand(bed, "decode", [17] * 300, handoff_id, endpoints=endpoints)[0] == 200
    code, answer = by_hand(bed, "decode", [17] * 300, handoff_id, endpoints=endpoints)
    assert code == 500
    assert "consumed" in json.dumps(answer)


@pytest.mark.parametrize("worker", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"secret": "another secret of good length"}, "ticket"),
        ({"valid_s": -1.0}, "expired"),
    ],
)
def test_false_tickets_are_refused_and_the_server_lives(
    bed: Testbed, worker: str, change: dict[str, Any], words: str
) -> None:
    handoff_id = new_handoff_id()
    ticket = ticket_of(handoff_id, **change)
    code, answer = by_hand(
        bed, worker, [19] * 50, handoff_id, ticket=ticket, endpoints=endpoints_of(bed)
    )
    assert code == 500
    assert words in json.dumps(answer)
    assert ticket not in bed.log(worker)


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_a_request_from_no_gateway_is_refused_and_the_server_lives(
    bed: Testbed, worker: str
) -> None:
    body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 2}
    foreign = {"bootstrap_host": "10.0.0.1", "bootstrap_room": 5}
    for more in ({}, foreign):
        assert post(bed.urls[worker], "/v1/completions", body | more)[0] in (400, 500)
    assert split(bed, "Still there?", 4).usage["completion_tokens"] == 4


def test_a_prefill_worker_with_another_secret_is_not_believed(bed: Testbed) -> None:
    handoff_id = new_handoff_id()
    with closing(World({"tcp": TcpTransport()})) as stranger:
        stranger.open(handoff_id=handoff_id)
        (endpoint,) = stranger.endpoints
        there = [{**e, "addresses": dict(endpoint.addresses)} for e in endpoints_of(bed)]
        code, answer = by_hand(bed, "decode", [41] * 40, handoff_id, endpoints=there)
        assert code == 500
        assert "secret" in json.dumps(answer)
        assert stranger.outcomes() == {}
    assert split(bed, "Still there?", 4).usage["completion_tokens"] == 4


def test_a_decode_worker_with_another_secret_gets_nothing(bed: Testbed) -> None:
    handoff_id, prompt = new_handoff_id(), [43] * 40
    assert by_hand(bed, "prefill", prompt, handoff_id)[0] == 200
    (told,) = endpoints_of(bed)
    where = Endpoint(0, 1, local_host_id(), {"tcp": told["addresses"]["tcp"]})
    sink = RecordingSink()
    with closing(World({"tcp": TcpTransport()})) as stranger:
        stranger.endpoints[:] = [where]
        with pytest.raises(AuthenticationError, match="secret"):
            stranger.load(Opened(handoff_id, ticket_of(handoff_id), [], []), sink)
    assert sink.empty
    code, _ = by_hand(bed, "decode", prompt, handoff_id, endpoints=endpoints_of(bed))
    assert code == 200, "the handoff is still there for the worker it is meant for"


def test_a_handoff_that_decode_never_takes_expires(bed: Testbed) -> None:
    handoff_id = new_handoff_id()
    assert by_hand(bed, "prefill", [23] * 300, handoff_id)[0] == 200
    time.sleep(LEASE_S + 1)
    code, answer = by_hand(bed, "decode", [23] * 300, handoff_id, endpoints=endpoints_of(bed))
    assert code == 500
    assert "expired" in json.dumps(answer)


def test_a_publisher_that_is_not_there_fails_the_request_in_time(bed: Testbed) -> None:
    dead = [{**e, "addresses": {"tcp": f"127.0.0.1:{free_ports(1)[0]}"}} for e in endpoints_of(bed)]
    code, answer = by_hand(bed, "decode", [29] * 50, new_handoff_id(), endpoints=dead)
    assert code == 500
    assert "connect" in json.dumps(answer)


def test_a_connection_that_is_reset_fails_the_request_and_leaves_nothing(bed: Testbed) -> None:
    handoff_id, prompt = new_handoff_id(), [37] * 600
    assert by_hand(bed, "prefill", prompt, handoff_id)[0] == 200
    with Resetter(endpoints_of(bed)[0]["addresses"]["tcp"], after_bytes=1 << 20) as resetter:
        through = [{**e, "addresses": {"tcp": resetter.address}} for e in endpoints_of(bed)]
        code, answer = by_hand(bed, "decode", prompt, handoff_id, endpoints=through)
    assert code == 500
    assert "handoff" in json.dumps(answer)
    assert resetter.resets == 1
    assert split(bed, "Still there?", 4).usage["completion_tokens"] == 4


def test_many_handoffs_leave_nothing_behind(bed: Testbed) -> None:
    def burst(count: int) -> None:
        for i in range(count):
            split(bed, f"{i} {text_of(60, seed=i)}", 1)

    def handles() -> dict[str, int]:
        return {
            name: sum(p.num_fds() + p.num_threads() for p in bed.processes(name))
            for name in ("prefill", "decode")
        }

    burst(5)
    until(lambda: idle(bed), "both workers to be idle")
    before, gateway = handles(), bed.gateway_process().num_fds()
    burst(40)
    until(lambda: idle(bed), "both workers to be idle")
    after = handles()
    assert all(after[name] <= before[name] + 4 for name in before), (before, after)
    assert bed.gateway_process().num_fds() <= gateway + 4


def test_sglangs_own_metrics_count_the_transfers(bed: Testbed) -> None:
    assert metric(bed.urls["prefill"], "sglang:kv_transfer_total_mb_count") > 40
    assert metric(bed.urls["decode"], "sglang:num_transfer_failed_reqs_total") >= 3


def test_a_role_is_switched_while_the_server_runs(bed: Testbed) -> None:
    def switch(role: str) -> None:
        until(lambda: idle(bed), "both workers to be idle")
        body = {"new_role": role, "decode_cuda_graph_memory_gb": 0}
        code, answer = post(bed.urls["decode"], "/pd_role_switch", body)
        assert (code, answer["success"]) == (200, True), answer

    switch("prefill")
    handoff_id = new_handoff_id()
    ticket = ticket_of(handoff_id, prefill="decode")
    assert by_hand(bed, "decode", [31] * 50, handoff_id, ticket=ticket)[0] == 200
    switch("decode")
    text = text_of(250, seed=32)
    answer = split(bed, text, 8, request_id="switched")
    assert answer.tokens == whole(bed, text, 8).tokens
    assert parity.record_of(bed, "switched")["split"] == "yes"


# Faults: the fleet does not survive these ------------------------------------------------------


def test_a_stopped_prefill_worker_does_not_hold_the_request(bed: Testbed) -> None:
    text = text_of(900, seed=40)
    expected = whole(bed, text, 8)
    processes = bed.processes("prefill")
    for process in processes:
        process.suspend()
    try:
        answer = split(bed, text, 8, request_id="stopped")
    finally:
        for process in processes:
            process.resume()
    assert answer.tokens == expected.tokens
    record = parity.record_of(bed, "stopped")
    assert record["split"] != "yes"
    assert record["failures"]
    until(lambda: idle(bed), "both workers to be idle")


def test_prefill_killed_during_a_prompt_is_served_by_the_worker_for_both(bed: Testbed) -> None:
    text = text_of(1200, seed=41)
    expected = whole(bed, text, 16)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(split, bed, text, 16, request_id="killed")
        until(lambda: in_flight(bed, "prefill") > 0, "the prefill")
        for process in engine_processes(bed, "prefill"):
            os.kill(process.pid, signal.SIGKILL)
        assert answer.result(timeout=90).tokens == expected.tokens
    record = parity.record_of(bed, "killed")
    assert record["failures"]
    assert record["split"] != "yes"
    assert record["decode"] == "whole"


def test_decode_without_prefill_leaves_requests_to_the_worker_for_both(bed: Testbed) -> None:
    text = text_of(400, seed=42)
    assert split(bed, text, 8, request_id="alone").tokens == whole(bed, text, 8).tokens
    assert parity.record_of(bed, "alone")["route"] == "local"


def test_decode_killed_during_an_answer_ends_the_stream_with_an_error(bed: Testbed) -> None:
    select(bed, "vllm-prefill", "decode")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(split, bed, "Once upon a time", 600)
        until(lambda: in_flight(bed, "decode") > 0, "the answer")
        for process in engine_processes(bed, "decode"):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(AnswerError):
            answer.result(timeout=60)
    code, answer = post(
        bed.gateway_url, "/v1/completions", {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1}
    )
    assert code in (502, 503)
    assert answer["error"]["message"]
    until(lambda: idle(bed, ("vllm-prefill",)), "the prefill worker to be idle")
