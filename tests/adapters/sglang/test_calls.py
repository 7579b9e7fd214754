"""What SGLang's scheduler calls: nothing but ``failure_exception`` may raise, or the server ends.

SGLang and torch are stood in for by the few names that the two modules take from them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from disagg_plugins.errors import HandoffAborted
from disagg_sglang.result import PrefillResult

FAILED = 0
PAGES = np.array([3, 1], np.int32)
RESULT = PrefillResult(17, 0, "form", b"row")
REQUEST = SimpleNamespace(rid="r", origin_input_ids=[1, 2, 3])


class Base:
    """What every class of ``sglang.srt.disaggregation.base.conn`` is here."""


POLL = SimpleNamespace(Failed=0, Bootstrapping=1, WaitingForInput=2, Transferring=3, Success=4)
BASES = {f"BaseKV{name}": Base for name in ("Sender", "Receiver", "Manager", "BootstrapServer")}
STANDINS: dict[str, dict[str, object]] = {
    "sglang": {"__version__": "0.5.23"},
    "sglang.srt.runtime_context": {"get_parallel": None},
    "sglang.srt.disaggregation.base.conn": {
        **BASES,
        "KVPoll": POLL,
        "KVTransferMetric": SimpleNamespace,
    },
    "torch": {"uint8": 1, "int16": 2, "int32": 3},
}


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, content in STANDINS.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


class FakeManager:
    """Hands out what the test gives; ``calls`` are what its parts were asked."""

    def __init__(self, broken: str = "") -> None:
        self.calls: list[object] = []
        self.broken = broken
        self.pool = SimpleNamespace(
            check_pages=lambda pages: self._maybe("check_pages"),
            layout=SimpleNamespace(block_size_tokens=2, num_blocks=lambda n: -(-n // 2)),
        )
        self.metadata = SimpleNamespace(read=lambda row: self._maybe("read") or RESULT)
        self.part = SimpleNamespace(
            state="idle",
            reason="",
            num_pages=2,
            poll=lambda: self.part.state,
            send=lambda *a, **k: (self._maybe("send"), self.calls.append((a, k))),
            start=lambda *a, **k: (self._maybe("start"), self.calls.append((a, k))),
            abort=self._abort,
        )

    def _abort(self, reason: str) -> None:
        self.part.state, self.part.reason = "failed", self.part.reason or reason

    def _maybe(self, what: str) -> None:
        if what == self.broken:
            raise OverflowError(f"{what} is broken")

    def publisher(self, address: str, token_ids: object) -> Any:
        self._maybe("expect")
        self.part.state = "open"
        return self.part

    load = publisher

    def pages_free(self) -> str:
        self._maybe("pages_free")
        return "an event"


Make = Callable[[FakeManager], Any]


@pytest.fixture
def sender(standins: None) -> Make:
    from disagg_sglang.sender import DisaggKVSender

    return lambda manager: DisaggKVSender(manager, "host:1", 7)  # type: ignore[arg-type]


@pytest.fixture
def receiver(standins: None) -> Make:
    from disagg_sglang.receiver import DisaggKVReceiver

    return lambda manager: DisaggKVReceiver(manager, "host:1", 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", ["expect", "check_pages", "read", "send"])
def test_a_sender_that_breaks_fails_its_request(sender: Make, broken: str) -> None:
    made = sender(FakeManager(broken))
    made.expect(REQUEST)
    made.init(2, 0)
    made.send(PAGES)
    assert made.poll() == FAILED
    with pytest.raises(HandoffAborted, match=f"{broken} is broken"):
        made.failure_exception()
    made.abort()
    made.clear()


@pytest.mark.parametrize("broken", ["expect", "check_pages", "pages_free", "start"])
def test_a_receiver_that_breaks_fails_its_request(receiver: Make, broken: str) -> None:
    made = receiver(FakeManager(broken))
    made.expect(REQUEST)
    made.init(0)
    made.send_metadata(PAGES, 0)
    assert made.poll() == FAILED
    with pytest.raises(HandoffAborted, match=f"{broken} is broken"):
        made.failure_exception()
    made.abort()
    made.clear()


def test_the_event_of_a_cached_prefix_goes_with_its_pages_only(sender: Make) -> None:
    """SGLang sends a cached prefix before the forward pass that writes it need have ended."""
    manager = FakeManager()
    made = sender(manager)
    made.expect(REQUEST)
    made.init(2, 0)
    made._early_send_wait_event = event = object()
    made.send(PAGES[:1])
    made.send(PAGES[1:])
    assert [options["written"] for _, options in manager.calls] == [event, None]


def test_a_load_waits_until_its_pages_are_free(receiver: Make) -> None:
    manager = FakeManager()
    made = receiver(manager)
    made.expect(REQUEST)
    made.send_metadata(PAGES, 0)
    [(_, options)] = manager.calls
    assert options == {"free": "an event"}


@pytest.mark.parametrize(
    ("on_host", "overlap", "event"), [(True, True, None), (False, False, None), (False, True, "e")]
)
def test_pages_are_free_at_once_unless_a_device_works_ahead(
    standins: None, on_host: bool, overlap: bool, event: str | None
) -> None:
    from disagg_sglang.manager import DisaggKVManager

    manager = DisaggKVManager.__new__(DisaggKVManager)
    stream = SimpleNamespace(record_event=lambda: "e")
    manager._on_host = on_host
    manager._scheduler = SimpleNamespace(enable_overlap=overlap, forward_stream=stream)
    assert manager.pages_free() == event
