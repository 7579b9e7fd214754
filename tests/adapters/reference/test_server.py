"""The server over a real socket: what clients send and get, and what they leave behind."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from disagg_reference.server import MAX_BODY_BYTES, Server, run_server
from disagg_reference.text import Text
from disagg_reference.tiny import EOS

if TYPE_CHECKING:
    from disagg_reference.engine import Engine

NAME = "demo"
WAIT_S = 10.0
PROMPT = [(3 * i * i + i) % 256 for i in range(40)]


class Client:
    """Asks one server."""

    def __init__(self, port: int, engine: Engine) -> None:
        self.port, self.engine = port, engine

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, HTTPMessage]:
        """Return status, body (parsed where it is JSON) and headers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
            connection.request("GET" if data is None else "POST", path, data, headers or {})
            answer = connection.getresponse()
            said = answer.read()
            if "json" in answer.headers.get("content-type", ""):
                return answer.status, json.loads(said), answer.headers
            return answer.status, said.decode(), answer.headers
        finally:
            connection.close()

    def complete(self, **body: Any) -> Any:
        status, said, _ = self.ask(
            "/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 8, **body}
        )
        assert status == 200, said
        return said

    def chat(self, **body: Any) -> Any:
        messages = [{"role": "user", "content": "Hello"}]
        status, said, _ = self.ask(
            "/v1/chat/completions",
            {"messages": messages, "temperature": 0, "max_tokens": 8, **body},
        )
        assert status == 200, said
        return said

    def settled(self) -> dict[str, float]:
        """Return the engine's figures when nothing runs any more."""
        deadline_s = time.monotonic() + WAIT_S
        ended = threading.Event()
        while True:
            stats = self.engine.stats()
            if not (stats["running"] or stats["waiting"] or stats["blocks_used"]):
                return stats
            assert time.monotonic() < deadline_s, stats
            ended.wait(0.005)


def events(stream: str) -> list[Any]:
    """Return the events of a stream, which must end with ``[DONE]``."""
    lines = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def serve(make_engine, model: Path, free_port) -> Iterator[Callable[..., Client]]:
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread]] = []

    def begin(**options: Any) -> Client:
        engine = make_engine(**options)
        loop, stop, port = asyncio.new_event_loop(), asyncio.Event(), free_port()
        server = Server(engine, Text(model), NAME)
        thread = threading.Thread(
            target=loop.run_until_complete, args=(run_server(server, "127.0.0.1", port, stop),)
        )
        thread.start()
        loops.append((loop, stop, thread))
        client, deadline_s = Client(port, engine), time.monotonic() + WAIT_S
        while True:
            try:
                client.ask("/health")
            except OSError:
                assert time.monotonic() < deadline_s
                thread.join(0.005)
            else:
                return client

    yield begin
    for loop, stop, thread in loops:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture
def client(serve) -> Client:
    return serve()


def test_a_completion_tells_text_reason_ids_and_usage(client: Client) -> None:
    said = client.complete(return_token_ids=True, ignore_eos=True)
    (choice,) = said["choices"]
    assert said["object"] == "text_completion"
    assert (said["model"], choice["finish_reason"]) == (NAME, "length")
    assert choice["prompt_token_ids"] == PROMPT
    assert len(choice["token_ids"]) == 8
    assert said["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 8,
        "total_tokens": 48,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert client.complete()["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


def test_a_text_is_answered_like_its_tokens(client: Client) -> None:
    text = "The same, as bytes"
    ids = Text(client.engine.options.model).encode(text)
    one, other = client.complete(prompt=text), client.complete(prompt=ids)
    assert one["choices"] == other["choices"]


def test_a_stream_says_the_same_in_pieces(client: Client) -> None:
    whole = client.complete(return_token_ids=True, ignore_eos=True)
    stream = events(
        client.complete(
            return_token_ids=True,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, usage = stream
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    ids = [token for choice in choices for token in choice["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"]
    assert choices[0]["prompt_token_ids"] == PROMPT
    assert [choice["finish_reason"] for choice in choices] == [None] * 7 + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert len({piece["id"] for piece in stream}) == 1


def test_a_chat_is_answered_whole_and_in_pieces(client: Client) -> None:
    whole = client.chat()
    assert whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    pieces = events(client.chat(stream=True))
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == message["content"]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}


def test_log_probabilities_are_told_in_both_forms(client: Client) -> None:
    told = client.complete(logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert [len(told[key]) for key in ("tokens", "token_logprobs", "top_logprobs")] == [3] * 3
    for chosen, best in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert chosen == pytest.approx(max(best.values()))
        assert chosen <= 0
    entries = client.chat(logprobs=True, top_logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert [len(entry["top_logprobs"]) for entry in entries["content"]] == [2] * 3


def test_a_stop_ends_the_answer_and_its_request(client: Client) -> None:
    text = client.complete(max_tokens=30, ignore_eos=True)["choices"][0]["text"]
    stop = text[5:7]
    said = client.complete(max_tokens=400, ignore_eos=True, stop=stop)
    (choice,) = said["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    client.settled()


def test_a_seed_draws_the_same(client: Client) -> None:
    drawn = [
        client.complete(temperature=1, seed=seed, return_token_ids=True)["choices"][0]["token_ids"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_end_comes_before_the_least_tokens(client: Client) -> None:
    early = client.complete(max_tokens=40, return_token_ids=True)["choices"][0]
    assert early["token_ids"][-1] == EOS
    least = client.complete(max_tokens=40, min_tokens=40, return_token_ids=True)
    ids = least["choices"][0]["token_ids"]
    assert len(ids) == 40
    assert EOS not in ids[:-1]
    assert ids[: len(early["token_ids"]) - 1] == early["token_ids"][:-1]


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-30, 2])
def test_no_temperature_ends_the_engine(client: Client, temperature: float) -> None:
    client.complete(temperature=temperature, seed=1)
    assert client.ask("/health")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\xff", 400, "no JSON"),
        ({"prompt": "Hi", "n": 2}, 400, "n must be 1"),
        ({"prompt": "Hi", "tools": [{}]}, 400, "tools is not supported"),
        ({"prompt": [300]}, 400, "outside the 257"),
        ({"prompt": ""}, 400, "at least one prompt token"),
        ({"prompt": "half \ud83d"}, 400, "half a surrogate"),
        ({"prompt": "Hi", "max_tokens": 9999}, 400, "more than the model's 4096"),
        ({"prompt": "Hi", "model": "other"}, 404, "not served here"),
        (b" " * (MAX_BODY_BYTES + 1), 413, ""),
    ],
    ids=lambda value: None if not isinstance(value, bytes) else f"{len(value)} bytes",
)
def test_a_mistake_is_told_as_openai_does(
    client: Client, body: Any, status: int, problem: str
) -> None:
    found, said, _ = client.ask("/v1/completions", body)
    assert found == status
    assert said["error"]["code"] == status
    assert said["error"]["type"] == "invalid_request_error"
    assert problem in said["error"]["message"]
    assert client.settled()["steps"] == 0


def test_messages_that_are_no_text_are_refused(client: Client) -> None:
    messages = [{"role": "user", "content": "half \ud83d"}]
    assert client.ask("/v1/chat/completions", {"messages": messages})[0] == 400


def test_a_demanded_id_in_use_is_refused_and_the_other_goes_on(serve) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def before_step(number: int) -> None:
        at_work.set()
        assert go_on.wait(WAIT_S)

    client = serve(before_step=before_step)
    params = {"request_type": "context_and_generation", "disagg_request_id": 1 << 40}
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(client.complete(disaggregated_params=params, ignore_eos=True))
    )
    thread.start()
    assert at_work.wait(WAIT_S)
    status, said, _ = client.ask(
        "/v1/completions", {"prompt": "Hi", "disaggregated_params": params}
    )
    go_on.set()
    thread.join(WAIT_S)
    assert (status, "is there already" in said["error"]["message"]) == (400, True)
    assert len(answers[0]["choices"][0]["token_ids"]) == 8


def test_a_client_that_leaves_frees_its_blocks(serve) -> None:
    go_on, held = threading.Event(), threading.Event()

    def before_step(number: int) -> None:
        if number > 20:  # the first tokens were written by then
            held.set()
            assert go_on.wait(WAIT_S)

    client = serve(before_step=before_step)
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    connection = HTTPConnection("127.0.0.1", client.port, timeout=WAIT_S)
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    assert held.wait(WAIT_S)
    assert client.engine.stats()["blocks_used"]
    assert connection.sock is not None
    cancelled, cancel = threading.Event(), client.engine.cancel

    def watched(request_id: int) -> None:
        cancel(request_id)
        cancelled.set()

    client.engine.cancel = watched
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert cancelled.wait(WAIT_S), "the server notices"
    go_on.set()
    assert client.settled()["steps"] < 900


def test_too_many_are_told_to_come_again(serve) -> None:
    client = serve(start=False, most_waiting=0, most_running=0)
    status, said, headers = client.ask("/v1/completions", {"prompt": "Hi"})
    assert (status, said["error"]["type"]) == (503, "server_error")
    assert int(headers["Retry-After"]) >= 1


def test_a_dead_engine_is_told_to_everybody(serve) -> None:
    def before_step(number: int) -> None:
        if number == 2:
            raise RuntimeError("out of memory")

    client = serve(before_step=before_step)
    body = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    status, said, _ = client.ask("/v1/completions", {**body, "stream": True})
    *_, last = events(said)
    assert (status, "out of memory" in last["error"]["message"]) == (200, True)
    status, said, _ = client.ask("/v1/completions", body)
    assert (status, "out of memory" in said["error"]["message"]) == (500, True)
    assert client.ask("/health")[0] == 503


def test_models_and_figures_are_told(client: Client) -> None:
    (card,) = client.ask("/v1/models")[1]["data"]
    assert (card["id"], card["max_model_len"]) == (NAME, 4096)
    client.complete(ignore_eos=True)
    figures = dict(
        line.split() for line in client.ask("/metrics")[1].splitlines() if line[:1] != "#"
    )
    assert figures["disagg_reference_blocks"] == "128"
    assert int(figures["disagg_reference_steps"]) >= 8


def test_a_name_given_by_the_client_is_that_of_the_answer(client: Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 1}
    _, said, _ = client.ask("/v1/completions", body, {"X-Request-Id": "mine"})
    assert said["id"] == "cmpl-mine"


def test_an_unknown_path_is_told_so(client: Client) -> None:
    status, said, _ = client.ask("/v1/embeddings", {})
    assert (status, said["error"]["code"]) == (404, 404)
