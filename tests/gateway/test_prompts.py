"""Prompts are counted, remembered and routed by what workers hold, through a running gateway."""

from __future__ import annotations

import threading

import pytest
import zmq

from disagg_plugins.gateway.token_counter import TokenCounter
from tests.gateway.harness import DEADLINE_S, eventually
from tests.gateway.test_kv_event_messages import BlockRemoved, message, stored
from tests.gateway.tokenizers_made import make_tokenizer

AFFINE = {"weights": {"prefix-affinity": 10, "least-loaded": 0}}
ALONE = {"w0": "both", "w1": "both", "w2": "both"}
TEXT = "word " * 300


def decodes(stack, count):
    return [record["decode"] for record in stack.records(count)]


def test_requests_of_one_beginning_go_to_one_worker(build):
    stack = build(scheduler=AFFINE, min_prompt_tokens=9999, **ALONE)
    for n in range(6):
        stack.complete(f"{TEXT}{n}")
    assert len(set(decodes(stack, 6))) == 1


def test_without_a_weight_they_are_spread(build):
    stack = build(min_prompt_tokens=9999, **ALONE)
    for n in range(6):
        stack.complete(f"{TEXT}{n}")
    assert len(set(decodes(stack, 6))) == 3


def test_a_salted_cache_is_another_cache(build):
    stack = build(scheduler=AFFINE, min_prompt_tokens=9999, **ALONE)
    for salt in ("a", "b", "c"):
        stack.complete(TEXT, cache_salt=salt)
        stack.complete(TEXT, cache_salt=salt)
    found = decodes(stack, 6)
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3


def test_a_worker_that_went_is_believed_to_hold_nothing(build):
    stack = build(scheduler=AFFINE, min_prompt_tokens=9999, **ALONE)
    stack.complete(TEXT)
    (home,) = decodes(stack, 1)
    believed = stack.gateway.prompts._believed
    assert believed.pieces(home) > 0
    stack.call(lambda: stack.gateway.worker_failed(home, "decode", "refused", "gone"))
    eventually(lambda: believed.pieces(home) == 0, "it is forgotten")


def test_one_session_stays_on_one_worker(build):
    rules = {"weights": {"session-affinity": 10, "least-loaded": 0}}
    stack = build(scheduler=rules, min_prompt_tokens=9999, **ALONE)
    for _ in range(4):
        stack.complete("hello", prompt_cache_key="session 1")
    body = {"model": "fake-model", "prompt": "hello", "max_tokens": 1}
    stack.request("POST", "/v1/completions", body, {"x-disagg-session": "session 1"})
    assert len(set(decodes(stack, 5))) == 1


class TestCounting:
    @pytest.fixture
    def model(self, tmp_path):
        return str(make_tokenizer(tmp_path / "model"))

    @pytest.fixture
    def stuck(self, monkeypatch):
        """Counting does not end before this is set."""
        gate = threading.Event()
        encode = TokenCounter.encode

        def slow(self, text, add):
            gate.wait(DEADLINE_S)
            return encode(self, text, add)

        monkeypatch.setattr(TokenCounter, "encode", slow)
        yield gate
        gate.set()

    @pytest.mark.parametrize("words", [100, 1000])
    def test_short_and_long_prompts_are_counted(self, build, model, words):
        stack = build(scheduler={"tokenizer": model})
        assert stack.complete("word " * words)[0] == 200
        assert stack.complete([1, 2, 3])[0] == 200
        counts = {r["prompt_tokens_by"]: r["prompt_tokens_estimate"] for r in stack.records(2)}
        assert counts == {"tokenizer": words + 1, "ids": 3}
        assert stack.status()["tokens_by"] == "tokenizer"

    def test_a_count_that_takes_too_long_is_given_up_for_the_estimate(self, build, model, stuck):
        stack = build(scheduler={"tokenizer": model, "tokenizer_s": 0.05})
        assert stack.complete("word " * 1000)[0] == 200
        (record,) = stack.records(1)
        assert (record["prompt_tokens_by"], record["prompt_tokens_estimate"]) == ("estimate", 1250)
        assert not stack.gateway.counting

    def test_a_client_that_leaves_meanwhile_leaves_nothing(self, build, model, stuck):
        stack = build(scheduler={"tokenizer": model, "tokenizer_s": 60})
        body = b'{"model": "fake-model", "prompt": "%b"}' % (b"word " * 1000)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        sock = stack.raw(head % len(body) + body)
        eventually(lambda: len(stack.gateway.counting) == 1, "it is being counted")
        sock.close()
        eventually(lambda: not stack.gateway.counting, "the client is noticed")
        stuck.set()
        assert stack.complete()[0] == 200
        assert len(stack.records(1)) == 1
        stack.wait_idle()

    def test_requests_that_are_being_counted_are_in_flight(self, build, model, stuck):
        rules = {"tokenizer": model, "tokenizer_s": 60}
        stack = build(scheduler=rules, gateway={"max_requests": 1})
        answers = []
        client = threading.Thread(target=lambda: answers.append(stack.complete("word " * 1000)))
        client.start()
        eventually(lambda: len(stack.gateway.counting) == 1, "it is being counted")
        assert stack.complete([1, 2])[0] == 503
        stack.request_stop()  # draining waits for it too
        stuck.set()
        client.join(DEADLINE_S)
        assert answers[0][0] == 200


def test_what_an_engine_publishes_decides_and_its_end_is_noticed(build):
    context = zmq.Context()
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.LINGER, 0)
    try:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        stack = build(
            scheduler=AFFINE,
            min_prompt_tokens=9999,
            kv_events={"w1": f"tcp://127.0.0.1:{port}"},
            **ALONE,
        )
        assert publisher.poll(DEADLINE_S * 1000)
        publisher.recv()
        ids = [n % 7 for n in range(256)]
        blocks = stored(block_hashes=[1, 2], token_ids=ids, block_size=128)
        publisher.send_multipart(message(0, blocks))
        events = stack.gateway.prompts.events
        eventually(lambda: events.knows("w1"), "the events are heard")
        for _ in range(4):
            stack.complete(ids)
        assert set(decodes(stack, 4)) == {"w1"}

        publisher.send_multipart(message(1, BlockRemoved([1], "GPU")))
        eventually(lambda: events.workers["w1"].batches == 2, "the removal is heard")
        other = [7, *ids[1:]]
        for _ in range(8):
            stack.complete(other)  # wherever the first went, it holds it; not w1 once told
        told = {w["name"]: w["kv_events"] for w in stack.status()["workers"]}
        assert told["w0"] is None
        assert (told["w1"]["state"], told["w1"]["blocks"]) == ("listening", 0)
        publisher.close()
        eventually(lambda: not events.knows("w1"), "its end is noticed")
    finally:
        publisher.close()
        context.destroy(linger=0)
