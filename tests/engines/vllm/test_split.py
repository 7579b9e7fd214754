"""A real prefill worker, a real decode worker, a plain vLLM and the gateway, on a real model.

The tests run in the order of this file against one fleet; the last ones kill parts of it.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import parity
from tests.corpus import prompts
from tests.engines.client import AnswerError, Completion, complete
from tests.engines.probes import engine_processes, idle, in_flight, metric, post, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODELS = Path(__file__).resolve().parents[3] / ".models"
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
LEASE_S = 6.0


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    servers = [
        Server("prefill", "prefill", (0,)),
        Server("decode", "decode", (1,)),
        Server("monolith", "monolith", (0,)),
    ]
    policy = {
        "scheduler": {"split": {"min_prompt_tokens": 64}},
        "handoff": {"lease_s": LEASE_S},
        "gateway": {"prefill_s": 60},
    }
    folder = tmp_path_factory.mktemp("split")
    with Testbed(
        folder, MODELS / "SmolLM2-135M-Instruct", servers, flags=FLAGS, policy=policy
    ) as b:
        yield b


def text_of(tokens: int, seed: int) -> str:
    return next(prompts([tokens], seed=seed))


def monolith(bed: Testbed, text: str | list[int], max_tokens: int) -> Completion:
    return complete(bed.urls["monolith"], text, max_tokens=max_tokens, model=MODEL_NAME)


@pytest.mark.parametrize(
    "send", [parity.cold, parity.partly_cached, parity.wholly_cached, parity.failed_handoff]
)
@pytest.mark.parametrize("tokens", [300, 1100])
def test_answers_are_the_monoliths(bed: Testbed, send: parity.Send, tokens: int) -> None:
    text = text_of(tokens, seed=tokens)
    text = f"{send.__name__} {text}"  # so that no case finds another one's prefix
    expected = monolith(bed, text, 32)
    assert parity.compare(send(bed, text, 32), expected) != "different"


def test_a_cold_prompt_is_loaded_whole(bed: Testbed) -> None:
    answer = parity.cold(bed, text_of(500, seed=11), 8, "whole")
    record = parity.record_of(bed, "whole")
    handoff = record["handoff"]
    assert record["route"] == "disaggregated"
    assert record["split"] == "yes"
    assert (record["prefill"], record["decode"]) == ("prefill", "decode")
    assert handoff["outcome"] == "consumed"
    assert handoff["tokens_loaded"] == answer.usage["prompt_tokens"] - 1
    assert handoff["tokens_recomputed"] == 1
    assert handoff["published_tokens"] == answer.usage["prompt_tokens"]
    assert handoff["bytes"] > 0
    assert handoff["transport"] == "shm"
    assert record["output_tokens"] == 8


def test_only_what_the_decode_workers_cache_lacks_is_moved(bed: Testbed) -> None:
    answer = parity.partly_cached(bed, text_of(700, seed=12), 8, "partly")
    handoff = parity.record_of(bed, "partly")["handoff"]
    prompt_tokens = answer.usage["prompt_tokens"]
    assert handoff["tokens_local"] >= 128
    assert handoff["tokens_local"] % 128 == 0
    assert handoff["tokens_loaded"] == prompt_tokens - handoff["tokens_local"] - 1
    per_token = 2 * 30 * 3 * 64 * 4
    blocks = -(-prompt_tokens // 128) - handoff["tokens_local"] // 128
    assert handoff["bytes"] == blocks * 128 * per_token


def test_a_short_prompt_stays_local(bed: Testbed) -> None:
    parity.cold(bed, "The capital of France is", 4, "short")
    record = parity.record_of(bed, "short")
    assert record["route"] == "local"
    assert record["handoff"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_answers_like_the_monolith_and_usage_is_right(bed: Testbed, stream: bool) -> None:
    message = "Summarise this:\n" + text_of(300, seed=13)
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": 16,
        "temperature": 0,
    }
    _, expected = post(bed.urls["monolith"], "/v1/chat/completions", body)
    text = expected["choices"][0]["message"]["content"]
    if not stream:
        status, answer = post(bed.gateway_url, "/v1/chat/completions", body)
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["usage"] == expected["usage"]
        assert "kv_transfer_params" not in answer or answer["kv_transfer_params"] is None
        return
    parts = bed.gateway_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(parts[0], int(parts[1]), timeout=120)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | options), headers)
    events = [
        json.loads(line[6:]) for line in connection.getresponse() if line.startswith(b"data: {")
    ]
    connection.close()
    said = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    assert said == text
    assert events[-1]["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_what_cannot_be_split_is_served_locally(bed: Testbed) -> None:
    body = {"model": MODEL_NAME, "prompt": text_of(200, seed=14), "max_tokens": 4, "n": 2}
    status, answer = post(bed.gateway_url, "/v1/completions", body, "two")
    assert status == 200
    assert len(answer["choices"]) == 2
    record = parity.record_of(bed, "two")
    assert record["route"] == "local"
    assert "n" in record["why"]


def test_requests_at_once_are_all_right(bed: Testbed) -> None:
    texts = list(prompts([150, 250, 350, 450, 550, 120], seed=15))
    expected = [monolith(bed, text, 12) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda text: parity.cold(bed, text, 12), texts))
    verdicts = [parity.compare(a, b) for a, b in zip(answers, expected, strict=True)]
    # Batching changes roundings; a difference beyond a tie would be wrong KV.
    assert verdicts.count("different") == 0


def test_errors_have_openais_shape(bed: Testbed) -> None:
    long = {"model": MODEL_NAME, "prompt": [5] * 4000, "max_tokens": 4}
    status, answer = post(bed.gateway_url, "/v1/completions", long)
    assert status == 400
    assert "2048" in answer["error"]["message"]
    status, answer = post(bed.gateway_url, "/v1/completions", {**long, "model": "no-such-model"})
    assert status == 404
    assert "no-such-model" in answer["error"]["message"]


@pytest.mark.parametrize("after_chunks", [0, 3])
def test_a_client_that_goes_away_stops_the_work_on_both_sides(
    bed: Testbed, after_chunks: int
) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": text_of(900, seed=16 + after_chunks),
        "max_tokens": 800,
        "ignore_eos": True,
        "stream": True,
    }
    parts = bed.gateway_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(parts[0], int(parts[1]), timeout=120)
    headers = {"Content-Type": "application/json", "X-Request-Id": f"gone-{after_chunks}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
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
    assert parity.record_of(bed, f"gone-{after_chunks}")["client_gone"]


def expired(bed: Testbed) -> float:
    # The engine reports statistics when it steps: a small request makes it.
    complete(bed.urls["prefill"], "Hello", max_tokens=1, model=MODEL_NAME)
    return metric(bed.urls["prefill"], "vllm:disagg_expired_total")


def test_a_handoff_that_decode_never_takes_expires(bed: Testbed) -> None:
    before = expired(bed)
    record, _ = parity.prefill(bed, text_of(300, seed=18))
    assert record["num_tokens"] > 0
    until(lambda: expired(bed) == before + 1, "the lease to end", LEASE_S + 30)


def test_kv_of_another_prompt_of_the_same_length_is_never_used(bed: Testbed) -> None:
    published, asked = [11] * 300, [13] * 300
    record, ticket = parity.prefill(bed, published)
    answer = parity.decode(bed, asked, 8, ticket, record)
    assert parity.compare(answer, monolith(bed, asked, 8)) != "different"
    complete(bed.urls["decode"], "Hello", max_tokens=1, model=MODEL_NAME)
    assert metric(bed.urls["decode"], "vllm:disagg_mismatched_total") == 1


def test_a_handoff_is_taken_once(bed: Testbed) -> None:
    text = text_of(300, seed=19)
    record, ticket = parity.prefill(bed, text)
    first = parity.decode(bed, text, 8, ticket, record)
    failed = metric(bed.urls["decode"], "vllm:disagg_load_failed_total")
    text_again = "Again. " + text
    other, other_ticket = parity.prefill(bed, text_again)
    assert other["num_tokens"] != record["num_tokens"]
    # The first ticket once more, on a prompt the decode worker has not cached.
    second = parity.decode(bed, text_again, 8, ticket, other)
    assert parity.compare(second, monolith(bed, text_again, 8)) != "different"
    assert parity.compare(first, monolith(bed, text, 8)) != "different"
    until(
        lambda: metric(bed.urls["decode"], "vllm:disagg_load_failed_total") > failed,
        "the failure in vLLM's metrics",
    )
    parity.decode(bed, text_again, 1, other_ticket, other)


@pytest.mark.parametrize("forged", ["AAAA", "%%%", "x" * 900])
def test_a_forged_ticket_is_counted_and_served_without_a_handoff(bed: Testbed, forged: str) -> None:
    before = metric(bed.urls["prefill"], "vllm:disagg_rejected_total")
    record, _ = parity.prefill(bed, "A prompt with a forged ticket. " * 5, ticket=forged)
    assert record == {}
    until(
        lambda: metric(bed.urls["prefill"], "vllm:disagg_rejected_total") == before + 1,
        "the rejection in vLLM's metrics",
    )


def test_many_handoffs_leave_nothing_behind(bed: Testbed) -> None:
    def burst(count: int) -> None:
        for i in range(count):
            parity.cold(bed, f"{i} {text_of(130, seed=i)}", 1)

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


def test_prefill_killed_during_a_prompt_is_computed_by_decode(bed: Testbed) -> None:
    text = text_of(1200, seed=21)
    expected = monolith(bed, text, 16)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(parity.cold, bed, text, 16, "killed")
        until(lambda: in_flight(bed, "prefill") > 0, "the prefill")
        for process in engine_processes(bed, "prefill"):
            os.kill(process.pid, signal.SIGKILL)
        assert parity.compare(answer.result(timeout=90), expected) != "different"
    record = parity.record_of(bed, "killed")
    assert record["failures"] or record["retries"]
    assert record["split"] != "yes"


def test_requests_stay_local_while_no_prefill_worker_lives(bed: Testbed) -> None:
    text = text_of(400, seed=22)
    answer = parity.cold(bed, text, 8, "alone")
    assert parity.compare(answer, monolith(bed, text, 8)) != "different"
    assert parity.record_of(bed, "alone")["split"] != "yes"


def test_decode_killed_during_an_answer_ends_the_stream_with_an_error(bed: Testbed) -> None:
    started_s = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(parity.cold, bed, "Once upon a time", 600)
        until(lambda: in_flight(bed, "decode") > 0, "the answer")
        for process in engine_processes(bed, "decode"):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(AnswerError):
            answer.result(timeout=60)
    assert time.monotonic() - started_s < 60
    status, answer = post(
        bed.gateway_url, "/v1/completions", {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1}
    )
    assert status in (500, 502, 503)
    assert answer["error"]["message"]
