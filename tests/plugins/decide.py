"""Run by a test in a process of its own: load the installed plugins, decide, print what came."""

from __future__ import annotations

import json

from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker

WORKERS = [
    Worker("p", "http://127.0.0.1:9001", "vllm", Role.PREFILL),
    Worker("d1", "http://127.0.0.1:9002", "vllm", Role.DECODE, labels={"banned": "decode"}),
    Worker("d2", "http://127.0.0.1:9003", "vllm", Role.DECODE),
    Worker("d3", "http://127.0.0.1:9004", "vllm", Role.DECODE, labels={"memory": "hbm3"}),
]


def main() -> None:
    fleet = [{"name": w.name, "url": w.url, "role": w.role} for w in WORKERS]
    said = {"fleet": {"workers": fleet}, "plugins": {"deadline_s": 5}}
    policy = Policy.model_validate(said)
    view = FleetView(WORKERS, {})
    chosen = {}
    for weight in (0, 10):
        weighted = Policy.model_validate(
            {**said, "scheduler": {"weights": {"example-scorer": weight}}}
        )
        with PluginHost.load(weighted.plugins) as host:
            profile = RequestProfile("r", "/v1/completions", "m", 900)
            scheduler = Scheduler(host, weighted)
            routes = [scheduler.decide(profile, view).route for _ in range(8)]
            chosen[weight] = sorted({route.decode.name for route in routes})
    with PluginHost.load(policy.plugins) as host:
        scheduler = Scheduler(host, policy)
        decisions = {}
        for tenant in ("batch", "web"):
            profile = RequestProfile("r", "/v1/completions", "m", 900, tenant=tenant)
            decision = scheduler.decide(profile, view)
            decisions[tenant] = [type(decision.route).__name__, decision.reason]
            decisions[tenant].append(decision.route.decode.name)
        found = {i.name: [i.distribution, i.version, i.state, i.problem] for i in host.describe()}
        told = {"decisions": decisions, "plugins": found, "counts": len(host.counts)}
        print(json.dumps({**told, "chosen": chosen}))


if __name__ == "__main__":
    main()
