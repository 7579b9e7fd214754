"""A real decode worker is killed inside its answer; another one goes on with it."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.engines.probes import engine_processes, status, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODELS = Path(__file__).resolve().parents[3] / ".models"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
TOKENS = 64


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    servers = [Server("decode0", "decode", (0,)), Server("decode1", "decode", (1,))]
    policy = {"gateway": {"first_byte_s": 30.0, "idle_s": 15.0, "probe_s": 0.5}}
    folder = tmp_path_factory.mktemp("resume")
    with Testbed(
        folder, MODELS / "SmolLM2-135M-Instruct", servers, flags=FLAGS, policy=policy
    ) as b:
        yield b


def stream(bed: Testbed, *, chat: bool, kill_after: int | None) -> str:
    """Return the text of a greedy stream whose worker is killed after so many events."""
    question = "Write a short story about a café in Zürich."
    body: dict[str, object] = {
        "model": MODEL_NAME, "stream": True, "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip
    if chat:
        body["messages"] = [{"role": "user", "content": question}]
    else:
        body["prompt"] = question
    where = bed.gateway_url.removeprefix("http://")
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with closing(http.client.HTTPConnection(where, timeout=120)) as connection:
        connection.request("POST", path, json.dumps(body).encode())
        answer = connection.getresponse()
        assert answer.status == 200
        text, events = "", 0
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            events += 1
            if events == kill_after:
                for name in busy(bed):
                    for process in engine_processes(bed, name):
                        os.kill(process.pid, signal.SIGKILL)
        return text


def busy(bed: Testbed) -> list[str]:
    """Return the workers that answer now, as the gateway's status says."""
    workers = status(bed)["workers"]
    return [str(said["name"]) for said in workers if said["requests"]]


@pytest.mark.parametrize("chat", [False, True])
def test_killed_decode_worker_is_not_seen_by_the_client(bed: Testbed, chat: bool) -> None:
    before = len(bed.records())
    whole = stream(bed, chat=chat, kill_after=None)
    assert stream(bed, chat=chat, kill_after=10) == whole
    until(lambda: len(bed.records()) >= before + 2, "the records of both streams")
    (resumed,) = [r for r in bed.records()[before:] if r["resumes"]]
    assert (resumed["resumes"], resumed["outcome"]) == (1, "ok")
    assert resumed["output_tokens"] == TOKENS
    for name in ("decode0", "decode1"):
        if not engine_processes(bed, name):
            bed.restart(name)
