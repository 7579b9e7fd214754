"""The second family through the same server: both workers are called at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway.fleet import Work
from disagg_plugins.telemetry.reports import Reporter
from disagg_plugins.testing.fake_engine import Behaviour
from disagg_vllm.dialect import KEY, VllmDialect
from tests.gateway.harness import SECRET, Stack, eventually

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, HandoffRef, Published
    from disagg_plugins.types import Family

Build = Callable[..., Stack]


class RoomDialect(VllmDialect):
    """Both sides meet in a room whose number the gateway chose."""

    family: Family = "rendezvous"
    answers_endpoints = False

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        raise LocalProtocolError("a rendezvous publishes nothing by its answer")

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        return {**super().prefill_body(body, ref), "room": ref.room, "address": ref.address}

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        assert published is None
        told = [dict(e) for e in ref.endpoints]
        return {**body, KEY: {}, "room": ref.room, "address": ref.address, "endpoints": told}


class DependentDialect(RoomDialect):
    """Its decode workers take handed-over requests only."""

    decode_is_whole = False


class RoomPlugin:
    def __init__(self, dialect: RoomDialect | None = None) -> None:
        self.dialect = dialect or RoomDialect()

    @hookimpl
    def disagg_register_dialects(self) -> list[RoomDialect]:
        return [self.dialect]


def introduce(
    stack: Stack, worker: str = "p0", ranks: int = 1, heard: Sequence[int] | None = None
) -> Stack:
    """Let a worker's ranks say where they serve KV, as its adapter does when it starts.

    ``heard`` names those of the ``ranks`` that do; all if None.
    """
    reporter = Reporter(f"http://127.0.0.1:{stack.port}", SECRET, worker)
    heard = range(ranks) if heard is None else heard
    for rank in heard:
        reporter.send(
            {
                "kind": "hello",
                "worker": worker,
                "tp_rank": rank,
                "tp_size": ranks,
                "endpoint": {"tp_rank": rank, "tp_size": ranks},
            }
        )
    state = stack.gateway.fleet.states[worker]
    eventually(lambda: state.endpoints.keys() >= set(heard), "the worker introduced itself")
    reporter.close()
    return stack


def test_both_are_called_with_the_same_room(build: Build) -> None:
    stack = introduce(build(dialects=RoomPlugin()), ranks=2)
    assert stack.complete(stream=True)[0] == 200
    stack.wait_idle()
    ours = stack.engines["p0"].seen.bodies[-1]
    theirs = stack.engines["d0"].seen.bodies[-1]
    assert ours["room"] == theirs["room"]
    assert ours["address"] == theirs["address"]
    assert stack.engines["p0"].url.endswith(str(ours["address"]))
    told = theirs["endpoints"]
    assert told == [{"tp_rank": 0, "tp_size": 2}, {"tp_rank": 1, "tp_size": 2}]


def test_prefill_failure_restarts_decode_alone(build: Build) -> None:
    stack = build(
        dialects=RoomPlugin(),
        behaviours={
            "p0": Behaviour(status=500),
            "d0": Behaviour(first_s=0.2, tokens=3),
        },
    )
    introduce(stack)
    assert stack.complete()[0] == 200
    stack.wait_idle()
    seen = stack.engines["d0"].seen
    assert seen.requests == 2
    assert "kv_transfer_params" not in seen.bodies[-1]
    eventually(lambda: seen.aborted == 1, "the waiting decode was cancelled")


def test_client_gone_cancels_both(build: Build) -> None:
    hang = {"p0": Behaviour(hang="head"), "d0": Behaviour(hang="head")}
    stack = introduce(build(dialects=RoomPlugin(), behaviours=hang))
    body = b'{"model":"fake-model","prompt":"' + b"word " * 300 + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock = stack.raw(head + body)
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen
        eventually(lambda seen=seen: seen.requests == 1, f"{name} works")
    sock.close()
    stack.wait_idle()
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen
        eventually(lambda seen=seen: seen.aborted == 1, f"{name} sees the abort")


def test_decode_failure_cancels_prefill_and_retries_alone(build: Build) -> None:
    stack = build(
        dialects=RoomPlugin(),
        behaviours={"p0": Behaviour(hang="head"), "d0": Behaviour(status=500, times=1)},
    )
    introduce(stack)
    assert stack.complete()[0] == 200
    stack.wait_idle()
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill was cancelled")


def test_without_an_introduction_the_decode_worker_serves_alone(build: Build) -> None:
    stack = build(dialects=RoomPlugin())
    assert stack.complete()[0] == 200
    [record] = stack.records(1)
    assert record["route"] == "local"
    assert "p0 has not said yet where it serves KV" in str(record["why"])
    assert stack.engines["p0"].seen.requests == 0


def test_without_an_introduction_a_dependent_decode_worker_is_not_asked(build: Build) -> None:
    stack = build(dialects=RoomPlugin(DependentDialect()))
    status, body = stack.complete()
    assert status == 503
    assert b"has not said yet where it serves KV" in body
    assert stack.engines["d0"].seen.requests == 0


def test_without_an_introduction_another_worker_serves_what_a_dependent_one_cannot(
    build: Build,
) -> None:
    stack = build(dialects=RoomPlugin(DependentDialect()), p0="prefill", d0="decode", b0="both")
    assert stack.complete()[0] == 200
    [record] = stack.records(1)
    assert (record["route"], record["decode"]) == ("local", "b0")
    assert "p0 has not said yet where it serves KV" in str(record["why"])


def test_a_worker_is_introduced_when_its_last_rank_is(build: Build) -> None:
    stack = introduce(build(dialects=RoomPlugin()), ranks=2, heard=[1])
    stack.complete()
    introduce(stack, ranks=2, heard=[0])
    stack.complete()
    first, second = stack.records(2)
    assert (first["route"], second["route"]) == ("local", "disaggregated")


def test_a_dependent_decode_worker_gets_short_prompts_handed_over_too(build: Build) -> None:
    stack = introduce(build(dialects=RoomPlugin(DependentDialect())))
    assert stack.complete("hi")[0] == 200
    [record] = stack.records(1)
    assert record["route"] == "disaggregated"
    assert "takes handed-over requests only" in str(record["why"])


def test_prefill_failure_with_a_dependent_decode_worker_reaches_the_client(build: Build) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(DependentDialect()),
            behaviours={"p0": Behaviour(status=500), "d0": Behaviour(hang="head")},
        )
    )
    status, body = stack.complete()
    assert status == 502
    assert b"http_500" in body
    stack.wait_idle()
    eventually(lambda: stack.engines["d0"].seen.aborted == 1, "the waiting decode was cancelled")


def test_a_silent_prefill_worker_with_a_dependent_decode_worker_reaches_the_client(
    build: Build,
) -> None:
    hang = {"p0": Behaviour(hang="head"), "d0": Behaviour(hang="head")}
    dialects = RoomPlugin(DependentDialect())
    stack = introduce(build(dialects=dialects, behaviours=hang, gateway={"prefill_s": 0.2}))
    status, body = stack.complete()
    assert status == 504
    assert b"gateway.prefill_s" in body
    stack.wait_idle()
    for name in ("p0", "d0"):
        seen = stack.engines[name].seen
        eventually(lambda seen=seen: seen.aborted == 1, f"{name} sees the abort")


@pytest.mark.parametrize("streamed", [False, True])
def test_decode_failure_of_a_dependent_worker_reaches_the_client(
    build: Build, streamed: bool
) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(DependentDialect()),
            behaviours={"p0": Behaviour(hang="head"), "d0": Behaviour(status=500)},
        )
    )
    assert stack.complete(stream=streamed)[0] == 502
    stack.wait_idle()
    assert stack.engines["d0"].seen.requests == 1
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill was cancelled")


def test_what_a_dependent_decode_worker_rejects_is_told_in_its_own_words(build: Build) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(DependentDialect()),
            behaviours={"p0": Behaviour(hang="head"), "d0": Behaviour(status=400)},
            gateway={"unhealthy_after": 1, "probe_s": 30},
        )
    )
    status, body = stack.complete()
    assert status == 400
    assert b"no worker could answer" not in body
    stack.wait_idle()
    assert stack.gateway.fleet.states["d0"].healthy
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill was cancelled")


@pytest.mark.parametrize("dialect", [RoomDialect, DependentDialect])
def test_what_the_prefill_worker_rejects_is_the_clients_error(
    build: Build, dialect: type[RoomDialect]
) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(dialect()),
            behaviours={"p0": Behaviour(status=400), "d0": Behaviour(hang="head")},
        )
    )
    assert stack.complete()[0] == 400
    stack.wait_idle()
    eventually(lambda: stack.engines["d0"].seen.aborted == 1, "the waiting decode was cancelled")


def test_prefill_failure_goes_to_a_worker_that_serves_whole_requests(build: Build) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(DependentDialect()),
            behaviours={"p0": Behaviour(status=500), "d0": Behaviour(hang="head")},
            p0="prefill",
            d0="decode",
            b0="both",
        )
    )
    stack.gateway.fleet.begin("b0", Work(10_000))  # busy, so that d0 is chosen
    assert stack.complete()[0] == 200
    [record] = stack.records(1)
    assert record["retries"] == 0
    assert stack.engines["b0"].seen.requests == 1
    stack.gateway.fleet.end("b0", Work(10_000))


def test_decode_failure_goes_to_a_worker_that_serves_whole_requests(build: Build) -> None:
    stack = introduce(
        build(
            dialects=RoomPlugin(DependentDialect()),
            behaviours={"p0": Behaviour(hang="head"), "d0": Behaviour(close="head")},
            p0="prefill",
            d0="decode",
            b0="both",
        )
    )
    assert stack.complete()[0] == 200
    stack.wait_idle()
    [record] = stack.records(1)
    assert (record["decode"], record["retries"]) == ("b0", 1)
    eventually(lambda: stack.engines["p0"].seen.aborted == 1, "prefill was cancelled")


def test_an_unsplittable_request_needs_a_worker_that_serves_whole_requests(build: Build) -> None:
    stack = introduce(build(dialects=RoomPlugin(DependentDialect())))
    status, body = stack.complete(n=2)
    assert status == 400
    assert b"n > 1" in body
    stack = introduce(
        build(dialects=RoomPlugin(DependentDialect()), p0="prefill", d0="decode", b0="both")
    )
    assert stack.complete(n=2)[0] == 200
    assert stack.engines["b0"].seen.requests == 1
