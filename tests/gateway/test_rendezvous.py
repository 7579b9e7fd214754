"""The second family through the same server: both workers are called at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.errors import LocalProtocolError
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


def introduce(stack: Stack, worker: str = "p0", ranks: int = 1) -> Stack:
    """Let a worker's ranks say where they serve KV, as its adapter does when it starts."""
    reporter = Reporter(f"http://127.0.0.1:{stack.port}", SECRET, worker)
    for rank in range(ranks):
        reporter.send(
            {
                "kind": "hello",
                "worker": worker,
                "tp_rank": rank,
                "tp_size": ranks,
                "endpoint": {"tp_rank": rank, "tp_size": ranks},
            }
        )
    fleet = stack.gateway.fleet
    eventually(lambda: len(fleet.endpoints(worker)) == ranks, "the worker introduced itself")
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
    stack.gateway.fleet.begin("b0", 10_000)  # busy, so that d0 is chosen
    assert stack.complete()[0] == 200
    [record] = stack.records(1)
    assert record["retries"] == 0
    assert stack.engines["b0"].seen.requests == 1
    stack.gateway.fleet.end("b0", 10_000)


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
