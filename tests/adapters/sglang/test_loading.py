"""Loading a request's KV into the pages of a decode worker, and giving it up at any moment."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from disagg_kv_shm import ShmTransport
from disagg_kv_tcp import TcpTransport
from disagg_plugins.errors import HandoffAborted, RemoteProtocolError, TransportError
from disagg_plugins.handoff.endpoints import to_json
from disagg_plugins.handoff.interfaces import LoadReport
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_plugins.handoff.tickets import Ticket, new_handoff_id, verify
from disagg_plugins.testing.handoffs import (
    LAYERS,
    SECRET,
    WAIT_S,
    World,
    quick_policy,
    rank_identity,
    wait_until,
)
from disagg_plugins.types import HandoffId
from disagg_sglang.loading import NoSink, PageLoad
from disagg_sglang.result import PrefillResult, pack_result
from disagg_sglang.room import Room

if TYPE_CHECKING:
    from disagg_plugins.handoff.publications import Publication

NUM_TOKENS, PAGE_TOKENS = 40, 16
PROMPT = range(NUM_TOKENS)
RESULT = PrefillResult(17, 4, "form", b"row")
ENDPOINT: dict[str, object] = {
    "tp_rank": 0,
    "tp_size": 1,
    "host_id": "h",
    "addresses": {"shm": "@a"},
}


class Pages:
    """A sink that is closed as ``PageSink`` is, and remembers in which order things happened."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.written: dict[tuple[int, int], bytes] = {}
        self.committed: list[PrefillResult] = []
        self.before: Callable[[int], object] = lambda layer: None
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def finish(self, write: Callable[[], None]) -> None:
        with self._lock:
            self._check_open()
            write()
            self._closed = True

    def write_native(self, layer: int, first_block: int, rows: memoryview) -> None:
        self._write(layer, first_block, rows)

    def write_canonical(
        self, layer: int, first_token: int, first_head: int, end_head: int, kv: memoryview
    ) -> None:
        self._write(layer, first_token, kv)

    def commit(self, result: PrefillResult) -> None:
        self.steps.append("result")
        self.committed.append(result)

    def _write(self, layer: int, first: int, kv: memoryview) -> None:
        self.before(layer)
        with self._lock:
            self._check_open()
            self.steps.append(f"layer {layer}")
            self.written[layer, first] = bytes(kv)

    def _check_open(self) -> None:
        if self._closed:
            raise HandoffAborted("-", "the engine has given the request up")


@dataclass
class FakeReader:
    """Writes three layers of zeros and returns ``result``, or raises ``error``."""

    result: bytes = b""
    error: Exception | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    def load(
        self, handoff_id: str, ticket: str, endpoints: Sequence[object], **asked: Any
    ) -> LoadReport:
        self.asked = {"ticket": ticket, "endpoints": endpoints, **asked}
        asked["cancellation"].check(handoff_id)
        if self.error is not None:
            raise self.error
        for layer in range(LAYERS):
            asked["sink"].write_native(layer, 0, memoryview(bytes(16)))
        num_tokens = asked["end_token"] - asked["first_token"]
        return LoadReport(HandoffId(handoff_id), "shm", "native", num_tokens, 48, 0.25, self.result)


class Loads:
    """Makes loads whose thread, sink and reports the test sees."""

    def __init__(self) -> None:
        self.pages = Pages()
        self.reports: list[dict[str, object]] = []
        self.executor = ThreadPoolExecutor(1)

    def make(
        self,
        reader: Any,
        room: Room | None = None,
        ticket: Ticket | None = None,
        prompt: Sequence[int] = PROMPT,
    ) -> PageLoad:
        now_s = time.time()
        return PageLoad(
            ticket or Ticket("a" * 32, "p", "d", now_s, now_s + 60),
            room or Room("ticket", [ENDPOINT]),
            prompt,
            reader=reader,
            executor=self.executor,
            wait_s=WAIT_S,
            report=self.reports.append,
        )

    def start(self, load: PageLoad, first_token: int = 0) -> None:
        load.start(self.pages, self.pages, first_token, self.pages.commit)

    def run(self, load: PageLoad, first_token: int = 0) -> None:
        self.start(load, first_token)
        self.join()

    def join(self) -> None:
        self.executor.submit(int).result(WAIT_S)


@pytest.fixture
def loads() -> Iterator[Loads]:
    loads = Loads()
    yield loads
    loads.executor.shutdown()


# What is asked for, and what is told ---------------------------------------------------------


def test_a_load_asks_for_the_whole_prompt_of_the_ticket(loads: Loads) -> None:
    reader = FakeReader(pack_result(RESULT))
    loads.run(loads.make(reader))
    assert (reader.asked["first_token"], reader.asked["end_token"]) == (0, NUM_TOKENS)
    assert reader.asked["prompt"] == prompt_digest(PROMPT)
    assert reader.asked["ticket"] == "ticket"
    assert [e.addresses for e in reader.asked["endpoints"]] == [{"shm": "@a"}]
    assert reader.asked["wait_s"] == WAIT_S


def test_the_result_is_committed_after_all_kv(loads: Loads) -> None:
    load = loads.make(FakeReader(pack_result(RESULT)))
    assert load.state == "idle"
    loads.run(load)
    assert load.state == "done"
    assert loads.pages.steps == ["layer 0", "layer 1", "layer 2", "result"]
    assert loads.pages.committed == [RESULT]


def test_what_was_loaded_is_reported(loads: Loads) -> None:
    loads.run(loads.make(FakeReader(pack_result(RESULT))), first_token=PAGE_TOKENS)
    assert loads.reports == [
        {
            "kind": "loaded",
            "handoff_id": "a" * 32,
            "num_tokens": NUM_TOKENS - PAGE_TOKENS,
            "tokens_local": PAGE_TOKENS,
            "tokens_recomputed": 0,
            "bytes": 48,
            "transport": "shm",
            "form": "native",
            "seconds": 0.25,
        }
    ]


def test_the_first_token_comes_from_the_room_where_no_result_comes(loads: Loads) -> None:
    loads.run(loads.make(FakeReader(), Room("ticket", [ENDPOINT], 0)))
    assert loads.pages.committed == [PrefillResult(0, 0, "", b"")]


def test_the_result_says_more_than_the_room(loads: Loads) -> None:
    loads.run(loads.make(FakeReader(pack_result(RESULT)), Room("ticket", [ENDPOINT], 5)))
    assert loads.pages.committed == [RESULT]


def test_a_prompt_that_is_cached_needs_the_result_alone(loads: Loads) -> None:
    reader = FakeReader(pack_result(RESULT))
    load = loads.make(reader)
    loads.run(load, first_token=NUM_TOKENS)
    assert load.state == "done"
    assert (reader.asked["first_token"], reader.asked["end_token"]) == (NUM_TOKENS - 1, NUM_TOKENS)
    assert isinstance(reader.asked["sink"], NoSink)
    assert loads.pages.steps == ["result"]
    assert loads.reports[0]["num_tokens"] == 0
    assert loads.reports[0]["tokens_local"] == NUM_TOKENS


# What goes wrong -----------------------------------------------------------------------------


def failed(problem: str) -> dict[str, object]:
    return {"kind": "failed", "handoff_id": "a" * 32, "problem": problem}


def test_a_load_without_any_first_token_fails_in_clear_words(
    loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    load = loads.make(FakeReader())
    loads.run(load)
    assert load.state == "failed"
    assert load.reason == (
        "RemoteProtocolError: neither the prefill worker nor the gateway told the first token of "
        "the answer"
    )
    assert loads.reports == [failed(load.reason)]
    assert not loads.pages.committed
    assert "told the first token" in caplog.text


@pytest.mark.parametrize(
    ("reader", "problem"),
    [
        (FakeReader(error=TransportError("shm", "it is gone")), r"TransportError: .*it is gone"),
        (FakeReader(error=IndexError("no such page")), r"IndexError: no such page"),
        (FakeReader(b"\xff"), r"RemoteProtocolError: .*malformed"),
    ],
)
def test_a_load_that_goes_wrong_fails_and_is_reported(
    loads: Loads, reader: FakeReader, problem: str
) -> None:
    load = loads.make(reader)
    loads.run(load)
    assert load.state == "failed"
    assert re.match(problem, load.reason)
    assert loads.reports == [failed(load.reason)]
    assert not loads.pages.committed


def test_a_commit_that_raises_fails_the_load(loads: Loads) -> None:
    def commit(result: PrefillResult) -> None:
        raise RemoteProtocolError("a metadata row of 3 bytes")

    load = loads.make(FakeReader(pack_result(RESULT)))
    load.start(loads.pages, loads.pages, 0, commit)
    loads.join()
    assert load.reason == "RemoteProtocolError: a metadata row of 3 bytes"
    assert loads.reports == [failed(load.reason)]


def test_a_long_problem_is_cut_in_the_report(loads: Loads) -> None:
    load = loads.make(FakeReader(error=ValueError("x" * 9999)))
    loads.run(load)
    assert loads.reports == [failed(load.reason[:500])]


def test_a_room_without_endpoints_is_refused_at_once(loads: Loads) -> None:
    with pytest.raises(RemoteProtocolError, match="endpoints"):
        loads.make(FakeReader(), Room("ticket"))


# Giving up -----------------------------------------------------------------------------------


def test_a_load_given_up_before_it_starts_never_starts(loads: Loads) -> None:
    reader = FakeReader(pack_result(RESULT))
    load = loads.make(reader)
    load.abort("SGLang aborted the request")
    loads.run(load)
    assert load.state == "failed"
    assert not reader.asked
    assert not loads.pages.steps


def test_a_load_given_up_while_it_waits_for_a_thread_reads_nothing(loads: Loads) -> None:
    busy = threading.Event()
    loads.executor.submit(busy.wait, WAIT_S)
    load = loads.make(FakeReader(pack_result(RESULT)))
    loads.start(load)
    load.abort("SGLang aborted the request")
    busy.set()
    loads.join()
    assert not loads.pages.steps
    assert loads.reports == [failed("SGLang aborted the request")]


@pytest.mark.parametrize("at_layer", range(LAYERS))
def test_not_one_byte_is_written_after_an_abort_has_returned(loads: Loads, at_layer: int) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def before(layer: int) -> None:
        if layer == at_layer:
            writing.set()
            go_on.wait(WAIT_S)

    loads.pages.before = before
    load = loads.make(FakeReader(pack_result(RESULT)))
    loads.start(load)
    assert load.state == "loading"
    assert writing.wait(WAIT_S)
    load.abort("SGLang aborted the request")
    steps = list(loads.pages.steps)
    go_on.set()
    loads.join()
    assert loads.pages.steps == steps == [f"layer {layer}" for layer in range(at_layer)]
    assert load.state == "failed"
    assert loads.reports == [failed("SGLang aborted the request")]


def test_a_result_that_comes_after_an_abort_is_not_committed(loads: Loads) -> None:
    class Late(FakeReader):
        def load(self, *args: Any, **asked: Any) -> LoadReport:
            report = super().load(*args, **asked)
            load.abort("SGLang aborted the request")
            return report

    load = loads.make(Late(pack_result(RESULT)))
    loads.run(load)
    assert not loads.pages.committed
    assert load.state == "failed"
    assert loads.reports == [failed("SGLang aborted the request")]


def test_the_first_reason_of_an_abort_stays(loads: Loads) -> None:
    load = loads.make(FakeReader())
    load.abort("first")
    load.abort("second")
    assert load.reason == "first"


def test_an_abort_right_after_the_result_stays(loads: Loads) -> None:
    class Late(Pages):
        def finish(self, write: Callable[[], None]) -> None:
            super().finish(write)
            load.abort("SGLang aborted the request")

    loads.pages = Late()
    load = loads.make(FakeReader(pack_result(RESULT)))
    loads.run(load)
    assert load.state == "failed"


def test_a_load_that_another_rank_lacks_fails_here_too(loads: Loads) -> None:
    load = loads.make(FakeReader(pack_result(RESULT)))
    loads.run(load)
    load.abort("another rank failed")
    assert (load.state, load.reason) == ("failed", "another rank failed")


# From a real publisher -----------------------------------------------------------------------


@pytest.fixture(params=["shm", "tcp"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    transport = {"shm": ShmTransport, "tcp": TcpTransport}[request.param]()
    world = World({request.param: transport}, policy=quick_policy(read_s=WAIT_S, load_s=WAIT_S))
    yield world
    world.close()


class Prefill:
    """One handoff of a publisher's, and the load of it."""

    def __init__(self, world: World, loads: Loads, prompt: Sequence[int] = PROMPT) -> None:
        handoff_id = new_handoff_id()
        text = world.ticket(handoff_id)
        self._store = world.store
        self._prompt = prompt_digest(prompt)
        self._ticket = verify(SECRET, text, time.time())
        room = Room(text, to_json(world.endpoints))
        reader = world.reader(rank_identity("decode"))
        self.load = loads.make(reader, room, self._ticket)

    def open(self) -> Publication:
        publication = self._store.open(self._ticket, NUM_TOKENS, prompt=self._prompt)
        for layer in range(LAYERS):
            publication.rows(layer)[:] = layer + 1
        publication.result = pack_result(RESULT)
        return publication

    def publish(self) -> None:
        publication = self.open()
        for layer in range(LAYERS):
            publication.publish(layer, publication.num_blocks)


ROW_BYTES = rank_identity("x").layout.row_bytes


def test_kv_and_result_come_from_a_prefill_that_opens_later(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads)
    loads.start(prefill.load)
    prefill.publish()
    loads.join()
    assert prefill.load.state == "done", prefill.load.reason
    assert loads.pages.steps == ["layer 0", "layer 1", "layer 2", "result"]
    assert loads.pages.written == {
        (layer, 0): bytes([layer + 1]) * 3 * ROW_BYTES for layer in range(LAYERS)
    }
    assert loads.pages.committed == [RESULT]
    assert loads.reports[0]["bytes"] == LAYERS * 3 * ROW_BYTES
    assert world.outcomes() == {"consumed": 1}


def test_blocks_that_are_cached_are_not_read(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads)
    prefill.publish()
    loads.run(prefill.load, first_token=2 * PAGE_TOKENS)
    assert set(loads.pages.written) == {(layer, 2) for layer in range(LAYERS)}
    assert loads.reports[0]["bytes"] == LAYERS * ROW_BYTES


def test_a_prompt_that_is_cached_still_ends_the_handoff(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads)
    prefill.publish()
    loads.run(prefill.load, first_token=NUM_TOKENS)
    assert loads.pages.steps == ["result"]
    assert world.outcomes() == {"consumed": 1}


def test_kv_of_another_prompt_is_not_taken(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads, prompt=range(1, NUM_TOKENS + 1))
    prefill.publish()
    loads.run(prefill.load)
    assert "KV of another prompt" in prefill.load.reason
    assert not loads.pages.steps
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the end of the handoff")


def test_an_abort_ends_the_wait_for_a_prefill_that_never_opens(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads)
    loads.start(prefill.load)
    wait_until(lambda: len(prefill.load._cancellation._channels) == 1, "the claim")
    started_s = time.monotonic()
    prefill.load.abort("SGLang aborted the request")
    loads.join()
    assert time.monotonic() - started_s < WAIT_S / 2
    assert prefill.load.state == "failed"
    assert loads.reports[0]["problem"] == "SGLang aborted the request"


def test_an_abort_while_prefill_computes_fails_the_handoff(world: World, loads: Loads) -> None:
    prefill = Prefill(world, loads)
    publication = prefill.open()
    publication.publish(0, publication.num_blocks)
    loads.start(prefill.load)
    wait_until(lambda: loads.pages.steps == ["layer 0"], "the first layer")
    prefill.load.abort("SGLang aborted the request")
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the end of the handoff")
    publication.publish(1, publication.num_blocks)
    publication.publish(2, publication.num_blocks)
    loads.join()
    assert loads.pages.steps == ["layer 0"]


def test_an_abort_in_the_middle_of_writing_stops_it(world: World, loads: Loads) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def before(layer: int) -> None:
        if layer == 1:
            writing.set()
            go_on.wait(WAIT_S)

    loads.pages.before = before
    prefill = Prefill(world, loads)
    prefill.publish()
    loads.start(prefill.load)
    assert writing.wait(WAIT_S)
    prefill.load.abort("SGLang aborted the request")
    go_on.set()
    loads.join()
    assert loads.pages.steps == ["layer 0"]
    assert prefill.load.state == "failed"
    wait_until(lambda: world.outcomes() == {"failed": 1}, "the end of the handoff")


def test_nothing_is_written_before_the_pages_are_free(loads: Loads) -> None:
    """A forward pass that was launched before its request ended may still write into them."""
    load = loads.make(FakeReader(pack_result(RESULT)))

    class Event:
        def synchronize(self) -> None:
            loads.pages.steps.append("free")

    load.start(loads.pages, loads.pages, 0, loads.pages.commit, free=Event())
    loads.join()
    assert load.state == "done"
    assert loads.pages.steps[:2] == ["free", "layer 0"]
