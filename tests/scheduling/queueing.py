"""Two workers and a queue each, as a small event simulation: for rules that decide by load.

The decode worker reads local prompts before its next step, so that every answer there waits; the
times are those of the predictor's own form, with noise.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count

from disagg_plugins.scheduling.prediction import decode_features, prefill_features
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

# DistServe's OPT-13B on one A100 (profiler-a100-80g.distserve.json), in seconds.
PREFILL = (0.01646, 9.265e-5, 6.475e-9, 9.265e-5, 0.0)
DECODE = (0.019935, 3.85e-5, 6.27e-7, 9.265e-5)
HANDOFF = (0.005, 4e-6)  # 0.8 MB of KV a token over 200 GB/s
NOISE = 0.05

P0 = Worker("p0", "http://127.0.0.1:1", "vllm", Role.PREFILL, capacity=1000)
D0 = Worker("d0", "http://127.0.0.1:2", "vllm", Role.DECODE, capacity=1000)


@dataclass
class Job:
    """One request."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    written: int = 0
    first_s: float = 0.0
    end_s: float = 0.0
    split: bool = False
    facts: dict[str, float] = field(default_factory=dict)
    read_before: int = 0

    def record(self):
        """Return what the gateway would have recorded."""
        return {
            "outcome": "ok",
            "stream": True,
            "route": "disaggregated" if self.split else "local",
            "split": "yes" if self.split else "no",
            "prefill": "p0" if self.split else None,
            "decode": "d0",
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ttft_s": self.first_s - self.arrival_s,
            "tpot_s": (self.end_s - self.first_s) / (self.output_tokens - 1),
            **self.facts,
        }

    def keeps(self, ttft_slo_s, tpot_slo_s):
        tpot_s = (self.end_s - self.first_s) / (self.output_tokens - 1)
        return self.first_s - self.arrival_s <= ttft_slo_s and tpot_s <= tpot_slo_s


@dataclass
class Fleet:
    """The state of both workers."""

    rng: random.Random
    reading: list[Job] = field(default_factory=list)  # on p0, in order
    handed: list[Job] = field(default_factory=list)  # on d0, to join at its next step
    local: list[Job] = field(default_factory=list)  # to be read on d0
    running: list[Job] = field(default_factory=list)
    read_here: int = 0  # prompt tokens read on d0 so far

    def arrived(self, job):
        """Give a job to the worker that reads it, and note the load, as the gateway does."""
        loads = self.view().loads
        reader = loads["p0" if job.split else "d0"]
        job.facts["prefill_queued_tokens"] = reader.prompt_tokens
        job.facts["prefill_requests"] = loads["p0"].requests
        self.decodes(job)
        (self.reading if job.split else self.local).append(job)

    def decodes(self, job):
        """Note the load of d0 when a job is sent there."""
        load = self.view().loads["d0"]
        job.facts |= {"decode_requests": load.requests, "decode_kv_tokens": load.kv_tokens}

    def view(self):
        queued = sum(job.prompt_tokens for job in self.reading)
        decoding = [*self.running, *self.handed]
        here = [*decoding, *self.local]
        loads = {
            "p0": WorkerLoad(len(self.reading), queued, prefills=len(self.reading)),
            "d0": WorkerLoad(
                len(here),
                sum(job.prompt_tokens for job in self.local),
                output_tokens=sum(job.output_tokens for job in here),
                kv_tokens=sum(job.prompt_tokens + job.output_tokens for job in here),
                prefills=len(self.local),
            ),
        }
        return FleetView((P0, D0), loads)

    def noisy(self, coefficients, features):
        total = sum(c * f for c, f in zip(coefficients, features, strict=True))
        return total * self.rng.lognormvariate(0.0, NOISE)

    def read_s(self, job):
        return self.noisy(PREFILL, prefill_features(job.prompt_tokens, 0, 0))


def jobs(seed, number, per_s, prompt_tokens, output_tokens=80):
    """Return Poisson arrivals with prompts of log-normal length."""
    rng, now_s, made = random.Random(seed), 0.0, []
    for _ in range(number):
        now_s += rng.expovariate(per_s)
        tokens = int(min(6000, max(16, prompt_tokens * rng.lognormvariate(0.0, 1.0))))
        made.append(Job(now_s, tokens, output_tokens))
    return made


def run(rule, arrivals, ttft_slo_s, tpot_slo_s, seed=1, ended=lambda record: None):
    """Serve all jobs, deciding each with ``rule``; the jobs know their times then.

    ``ended`` is told the record of each.
    """
    fleet, order = Fleet(random.Random(seed)), count()
    events = [(job.arrival_s, next(order), "arrival", job) for job in arrivals]
    heapq.heapify(events)
    busy = {"p0": False, "d0": False}

    def at(when_s, what, job=None):
        heapq.heappush(events, (when_s, next(order), what, job))

    def start_prefill(now_s):
        if fleet.reading and not busy["p0"]:
            busy["p0"] = True
            at(now_s + fleet.read_s(fleet.reading[0]), "read", fleet.reading[0])

    def start_decode(now_s):
        if busy["d0"]:
            return
        if fleet.local:
            busy["d0"] = True
            at(now_s + fleet.read_s(fleet.local[0]), "read here", fleet.local[0])
            return
        fleet.running += fleet.handed
        fleet.handed.clear()
        if fleet.running:
            busy["d0"] = True
            kv_tokens = sum(job.prompt_tokens + job.written for job in fleet.running)
            at(
                now_s + fleet.noisy(DECODE, decode_features(len(fleet.running), kv_tokens, 0)),
                "step",
            )

    def write(job, now_s):
        job.written += 1
        if job.written == 1:
            job.first_s = now_s
            job.read_before = fleet.read_here
        if job.written == job.output_tokens:
            job.end_s = now_s
            fleet.running.remove(job)
            job.facts["decode_read_tokens"] = fleet.read_here - job.read_before
            ended(job.record())

    while events:
        now_s, _, what, job = heapq.heappop(events)
        if what == "arrival":
            profile = RequestProfile(
                "r", "/v1/completions", "m", job.prompt_tokens, max_output_tokens=job.output_tokens,
                ttft_slo_s=ttft_slo_s, tpot_slo_s=tpot_slo_s,
            )  # fmt: skip
            job.split = rule(profile, fleet.view())
            fleet.arrived(job)
        elif what == "read":
            busy["p0"] = False
            fleet.reading.remove(job)
            job.facts["prefill_s"] = now_s - job.arrival_s
            fleet.decodes(job)
            at(now_s + fleet.noisy(HANDOFF, (1.0, job.prompt_tokens)), "handed", job)
        elif what == "handed":
            fleet.handed.append(job)
        elif what == "read here":
            busy["d0"] = False
            fleet.local.remove(job)
            fleet.running.append(job)
            fleet.read_here += job.prompt_tokens
            write(job, now_s)
        else:
            busy["d0"] = False
            for each in list(fleet.running):
                write(each, now_s)
        start_prefill(now_s)
        start_decode(now_s)


def attained(arrivals, ttft_slo_s, tpot_slo_s):
    """Return the share of requests that kept both bounds."""
    return sum(job.keeps(ttft_slo_s, tpot_slo_s) for job in arrivals) / len(arrivals)
