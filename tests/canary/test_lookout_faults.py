"""What must not hold up a look at the evidence, nor end the gateway."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace

from disagg_plugins.canary import pages
from disagg_plugins.canary.keeper import View
from disagg_plugins.canary.lookout import Lookout
from disagg_plugins.canary.progress import Progress
from disagg_plugins.gateway.admin import signed_headers
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import SECRET, eventually

RUNNING = View(Progress(rollout=1, phase="running", step=0, weight=50), 50)


class PretendKeeper:
    def __init__(self) -> None:
        self.reports = 0
        self.broken = False

    def look(self, *_: object) -> View:
        return RUNNING

    def report(self) -> tuple[object, object, None]:
        self.reports += 1
        time.sleep(0.01)  # as long as the numbers take
        if self.broken:
            raise ValueError("a number that cannot be")
        return None, SimpleNamespace(verdicts=()), None

    def close(self) -> None:
        """Nothing is open."""


def lookout_of(keeper: PretendKeeper) -> Lookout:
    store = SimpleNamespace(decisions=lambda most: (), close=lambda: None)
    return Lookout(
        keeper,  # type: ignore[arg-type]
        store,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        look_s=1.0,
        tie_gap=0.5,
        seen=lambda: (),
        looked=lambda view: None,
    )


def test_many_who_ask_at_once_share_one_report() -> None:
    """Each report keeps the thread, so the next look would wait for all of them."""
    keeper = PretendKeeper()

    async def ask() -> list[object]:
        lookout = lookout_of(keeper)
        try:
            return await asyncio.gather(*(lookout.report() for _ in range(20)))
        finally:
            await lookout.close()

    reports = asyncio.run(ask())
    assert all(report is reports[0] for report in reports)
    assert keeper.reports <= 2  # one of them is for the history


def test_a_history_that_fails_does_not_hide_what_was_decided() -> None:
    keeper = PretendKeeper()
    keeper.broken = True

    async def look() -> View:
        lookout = lookout_of(keeper)
        try:
            return await lookout.look()
        finally:
            await lookout.close()

    assert asyncio.run(look()) == RUNNING


def test_what_a_cancelled_look_took_is_counted_all_the_same() -> None:
    """The end of a gateway cancels a look, which may still wait for its turn on the thread."""
    looked: list[object] = []
    keeper = PretendKeeper()

    def look(_: object, outcomes: list[object]) -> View:
        looked.extend(outcomes)
        return RUNNING

    keeper.look = look  # type: ignore[method-assign]

    async def cancel() -> None:
        lookout, busy = lookout_of(keeper), threading.Event()
        waiting = [(RUNNING.epoch, "outcome")]
        lookout._seen = lambda: [waiting.pop()] if waiting else []  # type: ignore[assignment]
        lookout._thread.submit(busy.wait, 10.0)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(lookout.look())
            await asyncio.sleep(0)
            first.cancel()
        busy.set()
        await lookout.close()

    asyncio.run(cancel())
    assert looked == [(RUNNING.epoch, "outcome")]


def test_a_command_whose_turn_did_not_come_is_not_carried_out_later(arms, monkeypatch) -> None:
    monkeypatch.setattr(pages, "ANSWER_S", 0.2)
    site, busy = arms(), threading.Event()
    site.front.lookout._thread.submit(busy.wait, 10.0)
    path = pages.PATH.decode()
    command = {"do": "start", "by": "ann", "why": ""}
    headers = signed_headers(SECRET, "POST", path, json.dumps(command).encode(), time.time())
    status, _, body = site.request("POST", path, command, headers)
    assert (status, b"'start' may have been carried out" in body) == (503, True)
    looks = site.front.lookout.view
    busy.set()
    eventually(lambda: site.front.lookout.view is not looks, "the next look")
    assert site.front.lookout.view.progress.phase == "pending"


def test_a_sweep_of_copies_that_fails_does_not_end_the_gateway(arms) -> None:
    shadow = {"share": 1.0, "control": 0.0, "timeout_s": 0.3}
    site = arms(canary={"shadow": shadow}, behaviours={"c0": Behaviour(hang="head")})
    swept: list[float] = []

    def sweep(now_s: float) -> None:
        swept.append(now_s)
        raise RuntimeError("a copy could not be given up")

    site.front.copies.sweep = sweep
    eventually(lambda: len(swept) > 2 or not site._thread.is_alive(), "swept again and again")
    assert site.complete("hello")[0] == 200


def test_a_view_that_cannot_be_followed_does_not_end_the_gateway(arms) -> None:
    site = arms()
    looked: list[object] = []

    def follow(view: object) -> None:
        looked.append(view)
        raise RuntimeError("it could not be followed")

    site.front.lookout._looked = follow
    eventually(lambda: len(looked) > 2 or not site._thread.is_alive(), "looked again and again")
    assert site.complete("hello")[0] == 200


def test_a_tester_who_asks_for_the_candidate_hears_of_its_failure(arms) -> None:
    from disagg_plugins.canary.override import MintedBy, mint_override

    site = arms(behaviours={"c0": Behaviour(status=500)})
    minted = MintedBy(SECRET, "default")
    header = mint_override(minted, "candidate", now_s=time.time(), valid_s=60.0)
    body = {"model": "fake-model", "prompt": "hello", "max_tokens": 2}
    status, _, _ = site.request("POST", "/v1/completions", body, {"x-disagg-arm": header})
    assert status >= 500


def test_a_copy_is_sent_once(arms) -> None:
    site = arms(
        canary={"shadow": {"share": 1.0, "control": 0.0, "max_per_s": 1000}},
        behaviours={"c0": Behaviour(status=503)},
        b0="both",
        c0="both",
        c1="both",
    )
    for _ in range(30):
        assert site.complete("hello")[0] == 200
    eventually(lambda: not site.front.copies._sent, "nothing in flight")
    sent = sum(site.engines[name].seen.requests for name in ("c0", "c1"))
    assert sent == site.front.copies.copied["candidate"] > 0
