"""A fleet in virtual time, of engines that take what measured ones take (``testing.pace``).

Requests arrive at random; how they ended is told to the gateway's own ``SlowWorkers``.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from disagg_plugins.gateway.fleet import FleetState
from disagg_plugins.gateway.slow_workers import SlowWorkers
from disagg_plugins.gateway.worker_state import Work, rest_of
from disagg_plugins.telemetry.metrics import Metrics
from disagg_plugins.telemetry.records import RequestRecord
from disagg_plugins.testing.pace import PROFILES, Batch, Job, Profile
from disagg_plugins.types import Role, Worker
from disagg_vllm.dialect import VllmDialect

Pick = Callable[["World", list[str], int], str]
"""Takes the workers in use and the prompt's length, returns one."""


def least_loaded(world: World, names: list[str], tokens: int) -> str:
    return min(names, key=lambda name: world.fleet.states[name].requests)


def at_random(world: World, names: list[str], tokens: int) -> str:
    return world.dice.choice(names)


def half_to_the_first(world: World, names: list[str], tokens: int) -> str:
    return names[0] if world.dice.random() < 0.5 else world.dice.choice(names)


def long_to_the_first(world: World, names: list[str], tokens: int) -> str:
    return names[0] if tokens > 2000 else world.dice.choice(names)


def record(**known: Any) -> RequestRecord:
    plain: dict[str, Any] = {
        "request_id": "r", "at_s": 0.0, "endpoint": "/v1/completions", "model": None,
        "route": "local", "why": "", "prefill": None, "decode": "", "stream": True,
        "prompt_tokens_estimate": 1, "outcome": "ok",
    }  # fmt: skip
    return RequestRecord(**{**plain, **known})


class World:
    """A gateway's view of workers of one role, and the workers.

    Args:
        workers: How many.
        role: What they do: ``decode`` workers read prompts too, ``prefill`` workers write nothing.
        slower: By worker, how many times slower it is; may change while it runs.
        profile: The engine.
        pick: Who gets a request.
        seed: Of the requests.
        factor: The policy's ``gateway.slow_factor``.
    """

    def __init__(
        self,
        workers: int,
        *,
        role: Role = Role.DECODE,
        slower: dict[str, float] | None = None,
        profile: str | Profile = "opt-13b-a100",
        pick: Pick = least_loaded,
        seed: int = 0,
        factor: float | None = 5.0,
    ) -> None:
        self.dice = random.Random(seed)
        self.now_s = 0.0
        self.slower = slower or {}
        self._role = role
        self._pick = pick
        made = PROFILES[profile] if isinstance(profile, str) else profile
        names = [f"w{n}" for n in range(workers)]
        described = tuple(
            Worker(name, f"http://127.0.0.1:{8000 + n}", "vllm", role, 100_000)
            for n, name in enumerate(names)
        )
        self.fleet = FleetState(described, {"vllm": VllmDialect()}, model=None, unhealthy_after=3)
        for name in names:
            self.fleet.probe_ok(name, ("m",))
        self.slow = SlowWorkers(self.fleet, Metrics(), factor)
        self.batches = {name: Batch(made) for name in names}
        self._running: dict[str, dict[Job, tuple[RequestRecord, Work, list[float]]]] = {
            name: {} for name in names
        }
        self._stepping: set[str] = set()
        self._read: Counter[str] = Counter()
        self._outs = dict.fromkeys(names, 0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.ended: Counter[str] = Counter()
        self.outs: list[tuple[str, float, int, str]] = []
        """Who was taken out, when, after how many answers of it in all, and why."""

    def _at(self, at_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), do))

    def run(
        self,
        requests: int,
        per_s: float,
        *,
        prompt: tuple[float, float] = (6.0, 1.2),
        output: tuple[float, float] = (4.5, 0.8),
    ) -> World:
        """Let so many requests arrive, with log-normal lengths (mu, sigma), and end."""
        at_s = self.now_s
        for _ in range(requests):
            at_s += self.dice.expovariate(per_s)
            tokens = min(16_000, max(1, int(self.dice.lognormvariate(*prompt))))
            written = min(1000, max(1, int(self.dice.lognormvariate(*output))))
            self._at(at_s, lambda t=tokens, w=written: self._arrive(t, w))  # type: ignore[misc]
        while self._events:
            self.now_s, _, do = heapq.heappop(self._events)
            do()
        return self

    def _arrive(self, tokens: int, written: int) -> None:
        serving = [worker.name for worker in self.fleet.view().serving(self._role)]
        name = self._pick(self, serving, tokens)
        state = self.fleet.states[name]
        if self._role is Role.PREFILL:
            written = 1
            told = record(prefill=name, prompt_tokens_estimate=tokens)
            told.prefill_queued_tokens = state.prompt_tokens
            told.prefill_requests = state.requests
        else:
            told = record(decode=name, prompt_tokens_estimate=tokens, output_tokens=written)
            told.decode_requests, told.decode_kv_tokens = state.requests, state.kv_tokens
        told.at_s = self.now_s
        work = self.fleet.begin(name, Work(tokens, tokens, written))
        job = Job(tokens, written)
        self._running[name][job] = told, work, []
        self.batches[name].add(job)
        if name not in self._stepping:
            self._stepping.add(name)
            self._step(name)

    def _step(self, name: str) -> None:
        step = self.batches[name].step()
        if step is None:
            self._stepping.discard(name)
            return
        seconds = step.seconds * self.slower.get(name, 1.0)
        self._at(self.now_s + seconds, lambda: self._stepped(name, step.wrote))

    def _stepped(self, name: str, wrote: list[Job]) -> None:
        for job in wrote:
            told, work, stamps_s = self._running[name][job]
            if not stamps_s:
                self._read[name] += job.prompt_tokens
                told.decode_read_tokens = self._read[name]
                self._running[name][job] = (
                    told, self.fleet.prompt_read(name, work), stamps_s
                )  # fmt: skip
            stamps_s.append(self.now_s)
            if job.over:
                self._end(name, job)
        self._step(name)

    def _end(self, name: str, job: Job) -> None:
        told, work, stamps_s = self._running[name].pop(job)
        self.fleet.end(name, work)
        self.fleet.succeeded(name)
        self.ended[name] += 1
        told.e2e_s = self.now_s - told.at_s
        if self._role is Role.PREFILL:
            told.prefill_s = told.e2e_s
        elif len(stamps_s) > 1:
            told.ttft_s = stamps_s[0] - told.at_s
            told.tpot_s = (stamps_s[-1] - stamps_s[0]) / (len(stamps_s) - 1)
            told.decode_read_tokens = self._read[name] - told.decode_read_tokens
        self.slow.ended(self.now_s, told)
        state = self.fleet.states[name]
        if state.outs != self._outs[name]:
            self._outs[name] = state.outs
            self.outs.append((name, self.now_s, self.ended[name], state.reason))
            rest_s = rest_of(state.relapses, 2.0, 60.0)
            self._at(self.now_s + rest_s, lambda: self.fleet.probe_ok(name, ("m",)))
