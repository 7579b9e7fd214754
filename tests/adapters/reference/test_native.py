"""Two engines in one process hand a prompt's KV over, by the project's own transports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins.engine.settings import WorkerSettings
from disagg_plugins.handoff.endpoints import to_json
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_plugins.policy import Policy
from disagg_reference.faults import Faults, FaultyHost
from disagg_reference.native import NativeHost

if TYPE_CHECKING:
    from disagg_reference.engine import Engine

SECRET = b"0123456789abcdef0123456789abcdef"
PROMPT = tuple((5 * i * i + i) % 256 for i in range(100))


def settings(worker: str, free_port: Callable[[], int], **handoff: object) -> WorkerSettings:
    policy = Policy.model_validate(
        {
            "fleet": {
                "workers": [
                    {"name": name, "url": f"http://127.0.0.1:{port}", "role": "both"}
                    for name, port in (("prefill", 1), ("decode", 2))
                ]
            },
            "gateway": {"port": free_port()},  # nobody listens: reports are lost, handoffs are not
            "handoff": {"load_s": 5.0, "lease_s": 5.0, **handoff},
        }
    )
    return WorkerSettings(policy, SECRET, worker)


class Pair:
    """A prefill and a decode engine."""

    def __init__(
        self,
        engines: dict[str, Engine],
        ask: Callable[..., Any],
        hosts: dict[str, NativeHost],
        reports: list[dict[str, object]],
    ) -> None:
        self.prefill, self.decode, self._ask = engines["prefill"], engines["decode"], ask
        self.hosts, self.reports = hosts, reports

    def ticket(self) -> str:
        return mint(
            SECRET,
            handoff_id=new_handoff_id(),
            prefill="prefill",
            decode="decode",
            now_s=time.time(),
            valid_s=60.0,
        )

    def publish(self, prompt: tuple[int, ...], ticket: str) -> dict[str, Any]:
        record = {"version": 1, "step": "prefill", "ticket": ticket}
        asked = self._ask(self.prefill, prompt, 1, params={"disagg": record})
        assert asked.finish_reason == "length"
        return dict(asked.request.told.get("disagg", {}))

    def take(self, prompt: tuple[int, ...], ticket: str, told: dict[str, Any], tokens: int = 12):
        record = {**told, "step": "decode", "ticket": ticket}
        return self._ask(self.decode, prompt, tokens, params={"disagg": record})

    @property
    def used_bytes(self) -> int:
        return sum(rank.store.stats().used_bytes for rank in self.hosts["prefill"].ranks)


@pytest.fixture
def pair(make_engine, ask, model: Path, free_port) -> Iterator[Callable[..., Pair]]:
    def build(
        *,
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
        faults: Faults | None = None,
        **handoff: object,
    ) -> Pair:
        hosts: dict[str, NativeHost] = {}
        reports: list[dict[str, object]] = []

        def maker(name: str):
            def make(pools, config):
                host = NativeHost(pools, model, settings(name, free_port, **handoff))
                hosts[name] = host
                host._report = reports.append
                return FaultyHost(host, pools, faults) if faults is not None else host

            return make

        options = {"prefill": prefill or {}, "decode": decode or {}}
        engines = {name: make_engine(host=maker(name), **more) for name, more in options.items()}
        return Pair(engines, ask, hosts, reports)

    return build


@pytest.fixture
def alone(make_engine, ask) -> list[int]:
    return ask(make_engine(), PROMPT, 12).tokens


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_decode_goes_on_with_the_kv_of_prefill(pair, alone, transport: str) -> None:
    two = pair(transports=[transport])
    ticket = two.ticket()
    told = two.publish(PROMPT, ticket)
    assert told["num_tokens"] == 100
    assert told["prompt"] == prompt_digest(PROMPT)
    assert told["endpoints"] == to_json([rank.endpoint for rank in two.hosts["prefill"].ranks])
    asked = two.take(PROMPT, ticket, told)
    assert asked.tokens == alone
    assert asked.request.matched_tokens == 99
    (report,) = [r for r in two.reports if r["kind"] == "loaded"]
    assert (report["num_tokens"], report["tokens_recomputed"]) == (99, 1)
    assert (report["transport"], report["form"]) == (transport, "native")
    assert two.used_bytes == 0


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ({"tp_size": 2}, {}),
        ({}, {"tp_size": 2}),
        ({"tp_size": 2}, {"tp_size": 2}),
        ({"block_size_tokens": 16}, {}),
        ({"block_size_tokens": 5, "budget_tokens": 7}, {"block_size_tokens": 32}),
    ],
)
def test_ranks_and_blocks_need_not_be_alike(
    pair, alone, prefill: dict[str, Any], decode: dict[str, Any]
) -> None:
    two = pair(prefill=prefill, decode=decode)
    ticket = two.ticket()
    asked = two.take(PROMPT, ticket, two.publish(PROMPT, ticket))
    assert asked.tokens == alone
    assert asked.request.matched_tokens == 99
    assert two.used_bytes == 0


def test_only_what_the_own_cache_lacks_is_taken(pair, ask, alone) -> None:
    two = pair()
    assert ask(two.decode, PROMPT[:50], 1).tokens
    ticket = two.ticket()
    asked = two.take(PROMPT, ticket, two.publish(PROMPT, ticket))
    assert asked.tokens == alone
    assert (asked.request.local_tokens, asked.request.matched_tokens) == (48, 51)


def test_a_prompt_that_is_all_here_is_not_taken_and_the_peer_is_told(pair, ask, alone) -> None:
    two = pair(decode={"block_size_tokens": 3})
    assert ask(two.decode, PROMPT + (1,), 1).tokens
    ticket = two.ticket()
    asked = two.take(PROMPT, ticket, two.publish(PROMPT, ticket))
    assert asked.tokens == alone
    assert (asked.request.local_tokens, asked.request.matched_tokens) == (99, 0)
    two.decode.close()  # waits for the release
    assert two.used_bytes == 0


@pytest.mark.parametrize("wrong", ["prompt", "tokens", "ticket", "peer"])
def test_what_cannot_be_taken_is_computed_and_told(pair, alone, wrong: str) -> None:
    two = pair(load_s=1.0)
    ticket = two.ticket()
    told = two.publish(PROMPT, ticket)
    if wrong == "prompt":
        told["prompt"] = prompt_digest(PROMPT[::-1])
    elif wrong == "tokens":
        told["num_tokens"] = 99
    elif wrong == "ticket":
        ticket = ticket[:-4] + "AAAA"
    else:
        two.prefill.close()
    asked = two.take(PROMPT, ticket, told)
    assert asked.tokens == alone
    assert asked.request.matched_tokens == 0
    if wrong != "ticket":  # whose handoff is unknown
        (report,) = [r for r in two.reports if r["kind"] == "failed"]
        assert report["tokens_recomputed"] == 100


def test_a_handoff_that_nobody_takes_is_freed_by_its_lease(pair) -> None:
    two = pair(lease_s=0.2)
    two.publish(PROMPT, two.ticket())
    end_s = time.monotonic() + 10.0
    while two.used_bytes and time.monotonic() < end_s:
        time.sleep(0.01)
    assert two.used_bytes == 0


def test_full_staging_leaves_the_prompt_to_decode(pair) -> None:
    two = pair(prefill={"num_blocks": 300}, staging_bytes=1 << 20)
    assert two.publish(PROMPT * 21, two.ticket()) == {}
    (report,) = two.reports
    assert report["kind"] == "failed"
    assert "staging" in str(report["problem"])


def test_dropped_transfers_publish_nothing(pair) -> None:
    two = pair(faults=Faults(drop_transfers=True))
    assert two.publish(PROMPT, two.ticket()) == {}


def test_damaged_kv_of_one_head_of_one_layer_changes_the_answer(pair, alone) -> None:
    two = pair(faults=Faults(corrupt=(1, 0)))
    ticket = two.ticket()
    asked = two.take(PROMPT, ticket, two.publish(PROMPT, ticket))
    assert asked.tokens != alone
    assert asked.request.matched_tokens == 99


def test_a_request_that_is_cancelled_while_it_loads_leaves_nothing(pair, ask) -> None:
    two = pair()
    ticket = two.ticket()
    told = two.publish(PROMPT, ticket)
    asked = two.take(PROMPT, ticket, told)
    two.decode.cancel(asked.request.request_id)
    assert asked.finish_reason in ("abort", "length")
    assert ask(two.decode, PROMPT[:5], 1).tokens
    assert two.decode.stats()["blocks_used"] == 0


def test_pools_that_are_not_in_host_memory_are_refused(make_engine, model, free_port) -> None:
    engine = make_engine(start=False)

    class Elsewhere:
        shape = engine.pools[0].shape
        tensor = type("T", (), {"device": type("D", (), {"type": "cuda"})()})()

    with pytest.raises(Exception, match="host memory only"):
        NativeHost([Elsewhere()], model, settings("decode", free_port))  # type: ignore[list-item]
