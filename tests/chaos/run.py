"""Requests through real gateways while workers are killed, stopped, slowed and cut off.

``make chaos``. Every request must end right or with a clear error, within a bound; none may be
lost, duplicated, mixed up or wrong; and at the end nothing may be left. The seed gives the same
requests and the same faults at the same times again. The last line is one JSON object.

    .venvs/dev/bin/python tests/chaos/run.py [--seed 7] [--requests 2000] [--seconds 45]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chaos.client import NOT_SENT, Client
from tests.chaos.fleet import BOUND_S, Fleet, fetched
from tests.chaos.judge import Verdict, judge
from tests.chaos.leaks import Baseline, leaks, rest
from tests.chaos.plan import BEHAVIOURS, Ask, Fault, asks, faults, gateway_faults

WARM_UP = 30
SHOWN = 20
"""Requests that went wrong are shown, so many of them."""


@dataclass(slots=True)
class Result:
    """What became of everything."""

    seed: int
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    leaked: list[str] = field(default_factory=list)
    split: int = 0
    slowest_s: float = 0.0
    memory: dict[str, list[float]] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether something happened that must not."""
        bad = ("lost", "duplicated", "wrong")
        return bool(self.leaked) or any(self.verdicts[v] for v in bad if v in self.verdicts)

    def line(self) -> dict[str, object]:
        """Return the last line of the output."""
        verdicts = {str(k): v for k, v in self.verdicts.items()}
        return {
            "requests": sum(verdicts.values()),
            "right": verdicts.get("right", 0),
            "clear_errors": verdicts.get("clear_error", 0),
            "lost": verdicts.get("lost", 0),
            "duplicated": verdicts.get("duplicated", 0),
            "wrong": verdicts.get("wrong", 0),
            "client_aborts": verdicts.get("client_abort", 0),
            "leaked": len(self.leaked),
            "seed": self.seed,
            "faults": dict(self.faults),
            "split_without_a_failure": self.split,
            "slowest_s": round(self.slowest_s, 2),
            "memory_mib": self.memory,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run is.

    Attributes:
        seed: Of requests and faults.
        requests: How many.
        seconds: Over which time they arrive.
        prefills: Prefill workers.
        decodes: Decode workers.
        gateways: Gateways; all but the first are ended and started again meanwhile.
        gap_s: Mean time between two faults.
    """

    seed: int
    requests: int = 2000
    seconds: float = 45.0
    prefills: int = 3
    decodes: int = 3
    gateways: int = 1
    gap_s: float = 0.3


class Run:
    """One run."""

    def __init__(self, plan: Plan, fleet: Fleet, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.fleet = fleet
        self.say = say
        self.result = Result(plan.seed)
        self.clients = [Client(g.port) for g in fleet.gateways.values()]
        self._gone: list[tuple[float, int]] = []  # when a gateway was ended, and which

    async def everything(self) -> Result:
        """Ask and torment; then calm down and look for what is left."""
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            try:
                await self.fleet.start(tasks)
                baseline = await self._warm_up()
                self.say(f"at rest after {time.monotonic() - began_s:.1f} s: {baseline}")
                planned = asks(self.plan.seed, self.plan.requests, self.plan.seconds)
                right = await self._right_answers(planned)
                async with asyncio.TaskGroup() as torment:
                    begin_s = time.monotonic()
                    for fault in self._faults():
                        torment.create_task(self._fault(fault, begin_s))
                    for number, ask in enumerate(planned):
                        torment.create_task(self._ask(ask, number, right[ask.name], begin_s))
                self.say(f"all asked within {time.monotonic() - begin_s:.1f} s")
                await self._calm()
                self.result.leaked = await leaks(self.fleet, baseline)
                await self._look(baseline)
                self.say(f"looked at what is left after {time.monotonic() - began_s:.1f} s")
            finally:
                for client in self.clients:
                    client.close()
                self.fleet.stop()
        self._count_records()
        return self.result

    def _faults(self) -> list[Fault]:
        plan, fleet = self.plan, self.fleet
        names = list(fleet.workers)
        found = faults(plan.seed, names, fleet.proxied, plan.seconds, plan.gap_s)
        return found + gateway_faults(list(fleet.gateways), plan.seconds)

    async def _warm_up(self) -> dict[str, Baseline | None]:
        for number, ask in enumerate(asks(-1 - self.plan.seed, WARM_UP, 1.0)):
            client = self.clients[number % len(self.clients)]
            reply = await client.ask(replace(ask, abort_after=None), BOUND_S)
            if reply.status != 200 or not reply.complete:
                raise RuntimeError(f"before any fault: {reply}")
        for client in self.clients:
            client.close()
        await asyncio.sleep(0.5)  # the last handoffs settle
        return {name: await rest(gateway) for name, gateway in self.fleet.gateways.items()}

    async def _right_answers(self, planned: list[Ask]) -> dict[str, str]:
        """Ask a worker that nothing happens to, without a gateway."""
        client = Client(self.fleet.reference.port)
        found = {}
        for ask in planned:
            body = json.dumps({**json.loads(ask.body), "stream": False}).encode()
            plain = replace(ask, body=body, stream=False, kept=True, abort_after=None)
            reply = await client.ask(plain, BOUND_S)
            choice = json.loads(reply.body)["choices"][0]
            found[ask.name] = (
                choice["message"]["content"] if "message" in choice else choice["text"]
            )
        client.close()
        return found

    async def _ask(self, ask: Ask, number: int, right: str, begin_s: float) -> None:
        await asyncio.sleep(max(0.0, begin_s + ask.at_s - time.monotonic()))
        which = number % len(self.clients)
        sent_s = time.monotonic()
        reply = await self.clients[which].ask(ask, BOUND_S)
        if reply.problem.startswith(NOT_SENT) and len(self.clients) > 1:
            which = (which + 1) % len(self.clients)  # as a balancer before the gateways would
            reply = await self.clients[which].ask(ask, BOUND_S)
        reply.gateway_gone = self._was_gone(which, sent_s)
        verdict, why = judge(reply, right, stream=ask.stream)
        self.result.verdicts[verdict] += 1
        self.result.slowest_s = max(self.result.slowest_s, time.monotonic() - sent_s)
        if verdict == "clear_error":
            self.result.errors[_short(why)] += 1
        elif verdict not in ("right", "client_abort"):
            self.result.problems.append(f"{ask.name} {verdict} at {ask.at_s:.2f} s: {why}")

    def _was_gone(self, which: int, sent_s: float) -> bool:
        """Whether a gateway was down at some time since ``sent_s``; a restart takes seconds."""
        return any(w == which and sent_s < s + 15 for s, w in self._gone)

    async def _fault(self, fault: Fault, begin_s: float) -> None:
        await asyncio.sleep(max(0.0, begin_s + fault.at_s - time.monotonic()))
        self.result.faults[fault.kind] += 1
        if fault.kind.startswith("gateway"):
            await self._end_gateway(fault)
            return
        worker, proxy = self.fleet.workers[fault.target], self.fleet.proxies.get(fault.target)
        if fault.kind == "kill":
            worker.send(signal.SIGKILL)
            await worker.ended(5)
            await asyncio.sleep(fault.for_s)
            worker.start()
        elif fault.kind == "stop":
            worker.send(signal.SIGSTOP)
            await asyncio.sleep(fault.for_s)
            worker.send(signal.SIGCONT)
        elif fault.kind == "behave":
            behaviour = BEHAVIOURS[fault.value]
            await fetched(f"{worker.url}/behave", {**behaviour, "times": 1 + fault.value % 3})
        elif proxy is not None:
            if fault.kind == "reset":
                proxy.reset_all()
            elif fault.kind == "cut":
                proxy.cut_after = fault.value
            else:
                proxy.delay_s = fault.value / 1000
                await asyncio.sleep(fault.for_s)
                proxy.delay_s = 0.0

    async def _end_gateway(self, fault: Fault) -> None:
        gateway = self.fleet.gateways[fault.target]
        which = list(self.fleet.gateways).index(fault.target)
        self._gone.append((time.monotonic(), which))
        number = signal.SIGKILL if fault.kind == "gateway_kill" else signal.SIGTERM
        gateway.send(number)
        await gateway.ended(10)
        await asyncio.sleep(fault.for_s)
        gateway.start()

    async def _calm(self) -> None:
        for client in self.clients:
            client.close()
        for proxy in self.fleet.proxies.values():
            proxy.calm()
        for worker in self.fleet.workers.values():
            worker.send(signal.SIGCONT)
            worker.start()
            await asyncio.to_thread(worker.wait_healthy)
            await fetched(f"{worker.url}/behave", {})
        await self.fleet.all_healthy()

    async def _look(self, baseline: dict[str, Baseline | None]) -> None:
        for name, gateway in self.fleet.gateways.items():
            now, before = await rest(gateway), baseline[name]
            if now is not None and before is not None:
                self.result.memory[name] = [before.rss_mib, now.rss_mib]

    def _count_records(self) -> None:
        """A request has one record at most, and one that was served has one."""
        lines = [line for p in self.fleet.records for line in p.read_text().splitlines()]
        records = [json.loads(line) for line in lines]
        self.result.split = sum(
            r["route"] == "disaggregated" and not r["failures"] and r["outcome"] == "ok"
            for r in records
        )
        names = Counter(r["request_id"] for r in records)
        for name, count in names.items():
            if count > 1:
                self.result.problems.append(f"{name} has {count} records")
                self.result.verdicts["duplicated"] += 1
        missing = self.result.verdicts["right"] + WARM_UP - len(names)
        if missing > 0 and len(self.fleet.gateways) == 1:
            self.result.leaked.append(f"{missing} requests were served and have no record")


def _short(why: str) -> str:
    """Return an error without what differs from one to the next."""
    return " ".join("N" if any(c.isdigit() for c in w) else w for w in why.split())[:110]


def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> Result:
    """Do one run."""
    import uvloop

    fleet = Fleet(folder, plan.prefills, plan.decodes, plan.gateways)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Run(plan, fleet, say).everything())


def report(result: Result, say: Callable[[str], None]) -> None:
    """Tell what happened in words."""
    for why, count in result.errors.most_common(SHOWN):
        say(f"{count:5d} clear errors: {why}")
    for problem in result.problems[:SHOWN]:
        say(f"PROBLEM: {problem}")
    for leak in result.leaked:
        say(f"LEAK: {leak}")


def main() -> int:
    """Run and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    usual = Plan(0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--seconds", type=float, default=usual.seconds)
    parser.add_argument("--prefills", type=int, default=usual.prefills)
    parser.add_argument("--decodes", type=int, default=usual.decodes)
    parser.add_argument("--gateways", type=int, default=usual.gateways)
    parser.add_argument("--gap-s", type=float, default=usual.gap_s)
    parser.add_argument("--folder", type=Path, default=None, help="keep logs and records here")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    say(f"seed {seed}: --seed {seed} gives the same requests and faults again")
    plan = Plan(
        seed, given.requests, given.seconds, given.prefills, given.decodes, given.gateways,
        given.gap_s,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(plan, folder, say)
    report(result, say)
    print(json.dumps(result.line()))
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
