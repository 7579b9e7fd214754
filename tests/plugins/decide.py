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
]


def main() -> None:
    fleet = [{"name": w.name, "url": w.url, "role": w.role} for w in WORKERS]
    policy = Policy.model_validate({"fleet": {"workers": fleet}, "plugins": {"deadline_s": 5}})
    with PluginHost.load(policy.plugins) as host:
        scheduler = Scheduler(host, policy)
        view = FleetView(WORKERS, {})
        decisions = {}
        for tenant in ("batch", "web"):
            profile = RequestProfile("r", "/v1/completions", "m", 900, tenant=tenant)
            decision = scheduler.decide(profile, view)
            decisions[tenant] = [type(decision.route).__name__, decision.reason]
            decisions[tenant].append(decision.route.decode.name)
        found = {i.name: [i.distribution, i.version, i.state, i.problem] for i in host.describe()}
        print(json.dumps({"decisions": decisions, "plugins": found, "counts": len(host.counts)}))


if __name__ == "__main__":
    main()
