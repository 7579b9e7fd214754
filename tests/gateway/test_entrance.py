"""What becomes of a request between its arrival and its beginning, whatever goes wrong there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_plugins.errors import NoCapacityError
from disagg_plugins.gateway.entrance import Entrance, Pending, Ways, tenant_of
from disagg_plugins.gateway.explanations import Explanation
from disagg_plugins.policy import SchedulerPolicy
from disagg_plugins.scheduling.tenants import MAX_NAME_CHARS
from disagg_plugins.telemetry.metrics import Metrics
from disagg_plugins.types import (
    Decision,
    Disaggregated,
    FleetView,
    Local,
    RequestProfile,
    Role,
    Worker,
)

P = Worker("p", "http://127.0.0.1:1", "vllm", Role.PREFILL, 1)
D = Worker("d", "http://127.0.0.1:2", "vllm", Role.DECODE)
TAKEN = Decision(Local(D), "no prefill worker left by prefill-slots", taken=True)
SPLIT = Decision(Disaggregated(P, D), "long")


class Client:
    """A client that knows who answers it."""

    by: Any = None
    broken_off = False

    def break_off(self, last: bytes) -> None:
        self.broken_off = True

    def answering(self, by: object) -> None:
        self.by = by


class Door:
    """An entrance whose gateway decides ``says``, and what it was told to do."""

    def __init__(self, **rules: object) -> None:
        self.says: Callable[[], Decision] = lambda: TAKEN
        self.begun: list[tuple[str, Decision]] = []
        self.refused: list[tuple[str, int, str]] = []
        self.begin: Callable[[Pending, Decision, float], None] = self._begin
        self.refuse: Callable[[Pending, NoCapacityError], None] = self._refuse
        self.deciding = ""
        ways = Ways(
            self._decide,
            lambda *args: self.begin(*args),
            lambda *args: self.refuse(*args),
            lambda profile: 0.5,
            lambda: FleetView((P, D), {}),
            lambda: None,
        )
        policy = {"tenants": {"*": {"max_requests": 2}}, **rules}
        self.entrance = Entrance(SchedulerPolicy.model_validate(policy), Metrics(), ways)

    def _decide(self, explanation: Explanation, body: object) -> Decision:
        self.deciding = explanation.profile.request_id
        return self.says()

    def _begin(self, pending: Pending, decision: Decision, queue_s: float) -> None:
        self.begun.append((pending.profile.request_id, decision))

    def _refuse(self, pending: Pending, exc: NoCapacityError) -> None:
        self.refused.append((pending.profile.request_id, exc.status, exc.problem))

    def admit(self, name: str) -> tuple[Decision | None, Client]:
        client = Client()
        explanation = Explanation(RequestProfile(name, "/v1/completions", "m", 100))
        parsed: Any = SimpleNamespace(body={})
        whose: Any = client
        pending = Pending(whose, parsed, explanation, b"", b"", explained=False)
        return self.entrance.admit(pending), client

    def inside(self) -> int:
        return sum(a.requests for a in self.entrance._tenants._accounts.values())


def test_who_finds_a_slot_begins_at_once() -> None:
    door = Door()
    door.says = lambda: SPLIT
    assert door.admit("a")[0] is SPLIT
    assert len(door.entrance) == 0


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    door = Door()
    assert door.admit("a")[0] is None
    door.says = lambda: SPLIT
    assert door.admit("b")[0] is None
    assert [name for name, _ in door.begun] == ["a", "b"]


def test_a_refused_request_counts_for_nobody() -> None:
    def full() -> Decision:
        raise NoCapacityError("full", retry_after_s=1.0)

    door = Door()
    door.says = full
    for _ in range(5):
        with pytest.raises(NoCapacityError, match="full"):
            door.admit("a")
    assert door.inside() == 0


def test_a_client_that_leaves_while_waiting_counts_for_nobody() -> None:
    door = Door()
    client = door.admit("a")[1]
    assert (len(door.entrance), door.inside()) == (1, 1)
    client.by.client_gone()
    client.by.client_gone()
    assert (len(door.entrance), door.inside()) == (0, 0)


def test_who_waits_too_long_gets_what_is_there() -> None:
    door = Door()
    door.admit("a")
    door.entrance.tick(float("inf"))
    assert door.begun == [("a", TAKEN)]


def test_who_waits_too_long_for_nothing_is_refused() -> None:
    def none() -> Decision:
        raise NoCapacityError("no worker", retry_after_s=1.0, taken=True)

    door = Door()
    door.says = none
    assert door.admit("a")[0] is None
    door.entrance.tick(0.0)
    assert (len(door.entrance), door.refused) == (1, [])
    door.entrance.tick(float("inf"))
    assert door.refused == [("a", 503, "no worker")]
    assert door.inside() == 0


@pytest.mark.parametrize("where", ["decide", "begin"])
def test_a_request_that_the_gateway_fails_at_is_answered_and_the_next_one_served(
    where: str,
) -> None:
    door, begin = Door(), None

    def fails(*args: object) -> Any:
        door.says, door.begin = lambda: SPLIT, begin or door._begin
        if where == "begin":
            door.entrance.failed(args[0])  # type: ignore[arg-type]
        raise RuntimeError("broken")

    door.admit("a")
    door.admit("b")
    if where == "decide":
        door.says = fails
    else:
        door.says, door.begin = (lambda: SPLIT), fails
    door.entrance.tick(0.0)
    assert [name for name, _, _ in door.refused] == ["a"]
    assert [name for name, _ in door.begun] == ["b"]
    assert len(door.entrance) == 0
    assert door.inside() == 1


@pytest.mark.parametrize("whose", ["a", "b"])
def test_a_refusal_that_fails_gives_a_place_back_exactly_once(whose: str) -> None:
    def decide() -> Decision:
        if door.deciding == whose and len(door.entrance) == 2:
            raise NoCapacityError("never", retry_after_s=1.0, status=400)
        return SPLIT if door.deciding == "b" else TAKEN

    def fails(pending: Pending, exc: NoCapacityError) -> None:
        raise RuntimeError("the answer could not be made")

    door = Door()
    clients = {"a": door.admit("a")[1]}
    door.says, door.refuse = decide, fails
    decision, clients["b"] = door.admit("b")
    assert decision is None, "it waited, and is refused or begun by itself"
    assert clients[whose].broken_off, "it is not left without an end"
    assert (len(door.entrance) + len(door.begun), door.inside()) == (1, 1)


def test_after_the_close_nobody_waits() -> None:
    door = Door()
    door.admit("a")
    door.entrance.close()
    assert [(name, status) for name, status, _ in door.refused] == [("a", 503)]
    assert door.admit("b")[0] is TAKEN
    assert len(door.entrance) == 0


@pytest.mark.parametrize(
    ("header", "user", "tenant"),
    [
        (None, None, None),
        (None, "u", "u"),
        (None, "", None),
        (b"t", "u", "t"),
        (b" t ", None, "t"),
        (b"", "u", None),
        (b"\xff", None, "\ufffd"),
        (b"x" * 5000, None, "x" * MAX_NAME_CHARS),
        (None, "y" * 5000, "y" * MAX_NAME_CHARS),
    ],
)
def test_the_tenant_is_the_headers_else_the_user(
    header: bytes | None, user: str | None, tenant: str | None
) -> None:
    headers = [] if header is None else [(b"x-disagg-tenant", header)]
    assert tenant_of(headers, user) == tenant
