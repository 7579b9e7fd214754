"""Two gateways, each a process of its own, share one rollout; one decides, and either may die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml

from disagg_plugins.cli.main import main
from disagg_plugins.testing.fake_engine import FakeEngine
from tests.canary.side_by_side import CANARY, GATEWAY, TELEMETRY
from tests.gateway.harness import SECRET, eventually, free_port

pytestmark = pytest.mark.fleet
WAIT_S = 30.0


class Process:
    """One ``disagg serve``."""

    def __init__(self, policy: Path, port: int) -> None:
        self.policy, self._port = policy, port
        self.start()

    def start(self) -> None:
        self._log = self.policy.with_suffix(".log").open("ab")
        command = [sys.executable, "-m", "disagg_plugins.cli.main", "serve", str(self.policy)]
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdout=self._log,
            stderr=self._log,
        )

    def kill(self) -> None:
        """As a power cut would."""
        self._process.kill()
        self._process.wait(WAIT_S)
        self._log.close()

    def ready(self) -> bool:
        try:
            self._get("/ready")
            return all(
                w["healthy"] for arm in self.document()["arms"].values() for w in arm["workers"]
            )
        except OSError:
            return False

    def document(self) -> dict:
        return json.loads(self._get("/internal/canary"))

    def arm_of(self, session: str) -> str:
        """Ask for an answer, and return the arm that gave it."""
        request = Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            data=json.dumps({"prompt": "hello", "max_tokens": 2}).encode(),
            headers={
                "content-type": "application/json",
                "x-disagg-session": session,
                "x-disagg-explain": "1",
            },
        )
        with urlopen(request, timeout=WAIT_S) as answer:
            told = answer.headers["x-disagg-explain"]
        arm: str = json.loads(told)["arm"].partition(":")[0]
        return arm

    def _get(self, path: str) -> bytes:
        with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=WAIT_S) as answer:
            return answer.read()


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    if request.param == "sqlite":
        return {"path": "rollout.sqlite", "lease_s": 1.0}
    monkeypatch.setenv("CANARY_DSN", request.getfixturevalue("postgres_dsn"))
    return {"postgres": {"env": "CANARY_DSN"}, "name": "two", "lease_s": 1.0}


@pytest.fixture
def gateways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: dict[str, object]
) -> Iterator[tuple[Process, Process, Path]]:
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    with ExitStack() as stack:
        engines = {name: stack.enter_context(FakeEngine(secret=SECRET)) for name in "bc"}
        fleets = {
            name: {"workers": [{"name": name, "url": engine.url, "role": "both"}]}
            for name, engine in engines.items()
        }
        running = []
        for number in (1, 2):
            port = free_port()
            policy = {
                "fleet": fleets["b"],
                "gateway": {**GATEWAY, "port": port},
                "telemetry": TELEMETRY,
                # by hand: while sessions are compared nothing is to move
                "canary": {**CANARY, "store": store, "approval": "manual"},
            }
            path = tmp_path / f"gateway{number}.yaml"
            path.write_text(yaml.safe_dump(policy))
            candidate = {"fleet": fleets["c"], "gateway": GATEWAY, "telemetry": TELEMETRY}
            (tmp_path / "candidate.yaml").write_text(yaml.safe_dump(candidate))
            process = Process(path, port)
            stack.callback(process.kill)
            running.append(process)
        for process in running:
            eventually(process.ready, "the gateway is ready", WAIT_S)
        yield running[0], running[1], tmp_path / "gateway1.yaml"


def drive(gateways: list[Process], until: Callable[[], bool], what: str) -> None:
    """Send requests to all of them until something has happened."""
    sent = 0

    def more() -> bool:
        nonlocal sent
        for _ in range(10):
            sent += 1
            for gateway in gateways:
                gateway.arm_of(f"session {sent}")
        return until()

    eventually(more, what, WAIT_S)


def test_they_agree_on_arms_one_decides_and_the_other_takes_over_when_it_is_killed(
    gateways: tuple[Process, Process, Path],
) -> None:
    first, second, policy = gateways
    assert main(["canary", "start", str(policy)]) == 0
    for gateway in (first, second):
        eventually(lambda g=gateway: g.document()["weight_here"] == 50, "half", WAIT_S)
    arms = {name: {g.arm_of(name) for g in (first, second)} for name in map(str, range(40))}
    assert all(len(found) == 1 for found in arms.values()), "both send a session to one arm"
    assert set.union(*arms.values()) == {"baseline", "candidate"}
    leading: list[bool] = []

    def one_leads() -> bool:
        # a lease passes on where its holder stalls, who learns of it at its next look
        leading[:] = (g.document()["leads"] for g in (first, second))
        return sum(leading) == 1

    eventually(one_leads, "one of them leads", WAIT_S)
    leader, other = (first, second) if leading[0] else (second, first)
    leader.kill()
    drive([other], lambda: other.document()["progress"]["phase"] == "awaiting", "it asks")
    assert main(["canary", "approve", str(other.policy)]) == 0
    eventually(lambda: other.document()["progress"]["phase"] == "completed", "completed", WAIT_S)
    assert other.document()["leads"]
    leader.start()
    eventually(leader.ready, "the killed one is back", WAIT_S)
    eventually(lambda: leader.document()["weight_here"] == 100, "at the same step", WAIT_S)
    assert main(["canary", "rollback", str(policy), "--why", "enough"]) == 0
    for gateway in (first, second):
        eventually(lambda g=gateway: g.document()["weight_here"] == 0, "rolled back", WAIT_S)
        assert gateway.arm_of("anybody") == "baseline"
