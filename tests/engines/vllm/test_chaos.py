"""Real workers that are killed, started again and stopped while requests keep coming."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import parity
from tests.corpus import prompts
from tests.engines.client import AnswerError, Completion, complete
from tests.engines.probes import engine_processes, idle, status, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

MODELS = Path(__file__).resolve().parents[3] / ".models"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
WORKERS = ("prefill", "decode0", "decode1")
REQUESTS = 42
AT_ONCE = 3
BOUND_S = 120.0
"""No answer may take longer: a prefill that is given up (15 s), two first bytes (20 s each), and an
answer of 24 tokens on a core that other workers use too."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    servers = [
        Server("prefill", "prefill", (0,)),
        Server("decode0", "decode", (1,)),
        Server("decode1", "decode", (1,)),
    ]
    policy = {
        "scheduler": {"split": {"min_prompt_tokens": 64}},
        "handoff": {"lease_s": 5.0, "load_s": 10.0},
        "gateway": {"prefill_s": 15.0, "first_byte_s": 20.0, "idle_s": 15.0, "probe_s": 0.5},
    }
    folder = tmp_path_factory.mktemp("chaos")
    with Testbed(
        folder, MODELS / "SmolLM2-135M-Instruct", servers, flags=FLAGS, policy=policy
    ) as b:
        yield b


class Progress:
    """How many requests are over; the tormentor waits for its turn by it."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def one_more(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, timeout=400)


def kill(bed: Testbed, name: str) -> None:
    for process in engine_processes(bed, name):
        os.kill(process.pid, signal.SIGKILL)


def torment(bed: Testbed, progress: Progress) -> None:
    progress.wait(6)
    kill(bed, "decode1")
    bed.restart("decode1")
    progress.wait(16)
    stopped = engine_processes(bed, "decode0")
    for process in stopped:
        process.suspend()
    progress.wait(19)
    for process in stopped:
        process.resume()
    progress.wait(26)
    kill(bed, "prefill")
    bed.restart("prefill")


def ask(bed: Testbed, text: str, tokens: int) -> Completion | AnswerError:
    try:
        return complete(bed.gateway_url, text, max_tokens=tokens, model=MODEL_NAME)
    except AnswerError as error:
        return error


def is_clear(error: AnswerError) -> bool:
    """Whether the gateway said what happened: by a status, or by an event in the stream."""
    return "'message'" in str(error) or '"message"' in str(error)


def descriptors(bed: Testbed, name: str) -> int:
    return sum(p.num_fds() for p in bed.processes(name))


def at_work(bed: Testbed) -> dict[str, tuple[int, int, int]]:
    """Return the workers that have requests, prompt tokens or busy connections, with the counts."""
    counts = {
        w["name"]: (w["requests"], w["prompt_tokens"], w["connections"]["busy"])
        for w in status(bed)["workers"]
    }
    return {name: left for name, left in counts.items() if any(left)}


def test_every_request_is_right_or_clearly_refused_and_nothing_is_left(bed: Testbed) -> None:
    lengths = [(40, 150, 400, 700)[i % 4] for i in range(REQUESTS)]
    texts = [f"{i}. {text}" for i, text in enumerate(prompts(lengths, seed=77))]
    ask(bed, "Before anything goes wrong. " + texts[3], 4)
    until(lambda: idle(bed, WORKERS), "the workers to be idle")
    at_rest = descriptors(bed, "decode0"), bed.gateway_process().num_fds()
    progress = Progress()

    def one(text: str) -> tuple[Completion | AnswerError, float]:
        began_s = time.monotonic()
        try:
            return ask(bed, text, 24), time.monotonic() - began_s
        finally:
            progress.one_more()

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE + 1) as pool:
        tormentor = pool.submit(torment, bed, progress)
        answers = list(pool.map(one, texts))
        tormentor.result()
    until(lambda: all(w["healthy"] for w in status(bed)["workers"]), "healthy workers", 60)

    assert max(seconds for _, seconds in answers) < BOUND_S
    errors = [a for a, _ in answers if isinstance(a, AnswerError)]
    assert [str(e) for e in errors if not is_clear(e)] == []
    right = 0
    for text, (answer, _) in zip(texts, answers, strict=True):
        if isinstance(answer, AnswerError):
            continue
        alone = complete(bed.urls["decode0"], text, max_tokens=24, model=MODEL_NAME)
        assert parity.compare(answer, alone) != "different", text[:40]
        right += 1
    assert right >= 28, [str(e) for e in errors]
    assert sum(r["split"] == "yes" for r in bed.records()) >= 10

    until(lambda: idle(bed, WORKERS), "the workers to be idle", 60)
    until(lambda: status(bed)["handoffs_open"] == 0, "no open handoff")
    # a probe of the gateway may have a connection at the moment of one look
    until(lambda: not at_work(bed), "no request and no busy connection at a worker")
    state = status(bed)
    assert state["in_flight"] == 0
    # one of this question, and each worker keeps one for its reports
    assert state["client_connections"] <= 1 + len(WORKERS)
    kept = sum(w["connections"]["idle"] for w in state["workers"])
    assert bed.gateway_process().num_fds() <= at_rest[1] + kept + 4
    # a peer that was killed leaves no mapping and no connection behind
    assert descriptors(bed, "decode0") <= at_rest[0] + 8
