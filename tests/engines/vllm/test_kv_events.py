"""What vLLM says of its prefix cache is what the gateway believes of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_plugins.gateway.kv_events import KvEvents
from disagg_plugins.scheduling.prefix_hashes import PIECE_TOKENS, PrefixHasher
from disagg_plugins.scheduling.prefix_index import PrefixIndex
from tests.engines.client import complete
from tests.engines.probes import engine_processes, until
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODEL = Path(__file__).resolve().parents[3] / ".models" / "SmolLM2-135M-Instruct"
FLAGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
HASHER = PrefixHasher(b"key")


class Listener:
    """Follows one engine on a loop of its own thread."""

    def __init__(self, endpoint: str) -> None:
        self.index = PrefixIndex(100_000)
        self.events = KvEvents({"w": endpoint}, self.index, HASHER)
        self.heard = self.events.workers["w"]
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self.events.run())
        self._thread = threading.Thread(target=self._run, name="listener")
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._task]))
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def usable(self, prompt: list[int]) -> int:
        """Return the tokens that a new request of this prompt should find cached."""
        pieces = dict(self.index.longest(HASHER.of_ids(prompt))).get("w", 0)
        tokens = pieces * PIECE_TOKENS
        return tokens - tokens % self.events.block_tokens("w")


@pytest.fixture
def endpoint() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kv") as folder:  # a socket's path is at most 107 long
        yield f"ipc://{folder}/events"


def test_the_index_claims_what_the_engine_finds_and_nothing_once_it_is_dead(
    tmp_path: Path, endpoint: str
) -> None:
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
    flags = ("--kv-events-config", json.dumps(config), "--enable-prompt-tokens-details")
    server = Server("monolith", "monolith", (0, 1), args=flags)
    listener = Listener(endpoint)
    try:
        with Testbed(tmp_path, MODEL, [server], flags=FLAGS, gateway=False) as bed:
            url, choose = bed.urls["monolith"], random.Random(1)
            first = [choose.randrange(100, 40_000) for _ in range(700)]
            complete(url, first, max_tokens=2, model=MODEL_NAME)
            until(lambda: listener.usable(first) >= 512, "the blocks of the first prompt")
            for shared in (0, 100, 130, 400, 640):
                rest = [choose.randrange(100, 40_000) for _ in range(90)]
                prompt = first[:shared] + rest
                claimed = listener.usable(prompt)
                answer = complete(url, prompt, max_tokens=2, model=MODEL_NAME)
                details = answer.usage["prompt_tokens_details"] or {}
                assert claimed == details.get("cached_tokens", 0), shared
            assert listener.heard.clears == 0
            for process in engine_processes(bed, "monolith"):
                os.kill(process.pid, signal.SIGKILL)
            until(lambda: listener.heard.state == "waiting", "the end to be noticed")
            assert listener.usable(first) == 0
    finally:
        listener.close()
