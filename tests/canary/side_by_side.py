"""Two deployments of pretend engines behind one gateway, from policy files as people write them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from disagg_plugins.canary.candidate import read_candidate
from disagg_plugins.canary.keeper import command
from disagg_plugins.canary.lookout import act, instant
from disagg_plugins.canary.store_opening import open_store
from disagg_plugins.canary.trial import Trial
from disagg_plugins.gateway.app import serve
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy_file import read_policy
from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine
from tests.gateway.harness import SECRET, Stack, VllmPlugin, eventually, free_port

if TYPE_CHECKING:
    from contextlib import ExitStack

    from disagg_plugins.canary.front import Front
    from disagg_plugins.gateway.server import Gateway

GATEWAY = {"probe_s": 0.1, "drain_s": 2.0, "probe_generate_s": None}
TELEMETRY = {"report_wait_s": 0.1}
GUARDRAILS = [
    {"metric": "error_rate", "slack": 0.2, "min_samples": 20},
    {"metric": "error_rate", "limit": 0.5, "required": False, "min_samples": 20},
]
CANARY = {
    "candidate": "candidate.yaml",
    "steps": [50, 100],
    "bake_s": 0.2,
    "look_s": 0.1,
    "horizon_s": 5.0,
    "guardrails": GUARDRAILS,
    "store": {"path": "rollout.sqlite", "lease_s": 2.0},
}


class SideBySide(Stack):
    """A gateway with two arms: workers ``b...`` and ``c...``."""

    front: Front

    def __init__(self, folder: Path) -> None:
        self.loaded = read_policy(folder / "baseline.yaml")
        super().__init__(self.loaded.policy, folder / "records.jsonl")
        self.trial_candidate = read_candidate(self.loaded)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def ready(gateway: Gateway) -> None:
            self.gateway = gateway
            observer = gateway.observer
            self.front = observer._front  # type: ignore[union-attr]
            self._ready.set()

        plugins = [("fake_vllm", self._plugin)]
        candidate = self.trial_candidate
        assert candidate is not None
        with (
            PluginHost.load(entry_points=False, extra=plugins) as host,
            PluginHost.load(entry_points=False, extra=[("fake_vllm", VllmPlugin())]) as other,
        ):
            await serve(
                self.policy,
                host,
                secret=SECRET,
                records_path=self.records_path,
                base_dir=self.loaded.base_dir,
                trial=Trial(candidate, other, self.loaded.base_dir),
                ready=ready,
                stop=self._stop,
            )

    def command(self, do: str, by: str = "ann", why: str = "") -> None:
        """Carry out a command on the rollout's memory, as another process would."""
        canary = self.loaded.policy.canary
        assert canary is not None
        assert self.trial_candidate is not None
        store = open_store(canary.store, self.loaded.base_dir)
        try:
            plan = self.trial_candidate.plan
            command(store, plan, lambda r: act(r, do, instant(), by, why))  # type: ignore[arg-type]
        finally:
            store.close()

    def wait_weight(self, weight: int) -> None:
        eventually(
            lambda: self.front.lookout.view.weight == weight,
            f"{weight} %, but {self.front.lookout.view}",
        )

    def document(self, headers: dict[str, str] | None = None) -> dict[str, object]:
        status, _, body = self.request("GET", "/internal/canary", headers=headers)
        assert status == 200, body
        return json.loads(body)

    def wait_all_healthy(self) -> None:
        for gateway in self.front.arms.values():
            for name, state in gateway.fleet.states.items():
                eventually(lambda state=state: state.healthy, f"{name} is healthy")


def build_side_by_side(
    stack: ExitStack,
    folder: Path,
    *,
    behaviours: dict[str, Behaviour] | None = None,
    models: dict[str, str] | None = None,
    canary: dict[str, object] | None = None,
    candidate: dict[str, object] | None = None,
    baseline: dict[str, object] | None = None,
    absent: tuple[str, ...] = (),
    wait: bool = True,
    **roles: str,
) -> SideBySide:
    """Start engines (``b0="both", c0="prefill", c1="decode"``) and the gateway before them."""
    roles = roles or {"b0": "both", "c0": "both"}
    engines: dict[str, FakeEngine] = {}
    for name in roles:
        engine = FakeEngine(
            model=(models or {}).get(name, "fake-model"),
            behaviour=(behaviours or {}).get(name),
            secret=SECRET,
            port=free_port() if name in absent else 0,
        )
        if name not in absent:
            stack.enter_context(engine)
        engines[name] = engine

    def workers(arm: str) -> list[dict[str, object]]:
        return [
            {"name": name, "url": engines[name].url, "role": role}
            for name, role in roles.items()
            if name.startswith(arm)
        ]

    def write(name: str, policy: dict[str, object]) -> None:
        (folder / name).write_text(yaml.safe_dump(policy))

    write(
        "baseline.yaml",
        {
            "fleet": {"workers": workers("b")},
            "gateway": {**GATEWAY, "port": free_port()},
            "telemetry": TELEMETRY,
            "canary": {**CANARY, **(canary or {})},
            **(baseline or {}),
        },
    )
    write(
        "candidate.yaml",
        {
            "fleet": {"workers": workers("c")},
            "gateway": GATEWAY,
            "scheduler": {"split": {"min_prompt_tokens": 50}},
            "telemetry": {**TELEMETRY, "records": "candidate.jsonl"},
            **(candidate or {}),
        },
    )
    running = SideBySide(folder)
    running.engines = engines
    stack.callback(running.stop)
    running.start()
    if wait:
        running.wait_all_healthy()
    return running
