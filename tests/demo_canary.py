"""Move live traffic from a monolithic vLLM to a split one, then plant faults in the split one.

``make demo-canary`` runs it. Real vLLM servers (one monolith, one prefill, one decode), the gateway
with both arms, and clients that never stop asking. First a rollout that must complete, then three
faults, each in a rollout of its own, that must be rolled back: a slow decode worker, KV that is
damaged in silence, and a prefill worker that dies. It writes ``canary.json``; the exit code is not
zero when something else happened.

A client counts as hurt when it got an error, a wrong answer, or waited longer than ``SLOW_S``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from disagg_plugins.errors import DisaggError
from tests.corpus import prompts
from tests.engines.client import AnswerError, complete
from tests.engines.probes import engine_processes
from tests.engines.testbed import MODEL_NAME, Server, Testbed

FLAGS = (
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--dtype",
    "float32",
    # one prompt is asked again and again, and is to be read each time
    "--no-enable-prefix-caching",
)
CLIENTS = 4
TOKENS = 8
NUM_PROMPTS = 24
SLOW_S = 10.0
PROMOTE_S = 420.0
ROLLBACK_S = 420.0
ANNOUNCE_S = 15.0
DAMAGED = Path(__file__).resolve().parent / "engines" / "damaged"
HANDOFF = {"lease_s": 10.0, "load_s": 10.0, "transports": ["damaged"]}

CANARY: dict[str, Any] = {
    "candidate": "disagg.yaml",
    "steps": [50, 100],
    "bake_s": 5.0,
    "look_s": 1.0,
    "horizon_s": 60.0,
    "sticky": "request",
    "store": {"path": "rollout.sqlite"},
    "guardrails": [
        {"metric": "error_rate", "slack": 0.2, "min_samples": 10},
        # on two cores that three servers share, splitting has no speed to win
        {"metric": "goodput", "slack": 0.3, "min_samples": 10},
        {"metric": "error_rate", "limit": 0.3, "required": False, "min_samples": 10},
        {
            "metric": "split_share",
            "limit": 0.5,
            "better": "higher",
            "required": False,
            "min_samples": 10,
        },
    ],
    "shadow": {
        "share": 0.6,
        "control": 0.5,
        "max_in_flight": 4,
        "max_per_s": 4.0,
        "timeout_s": 30.0,
        "parity": {"min_pairs": 12, "prompt_tokens": []},
    },
}


SLO = {
    "split": {"rule": "always"},
    "slo_classes": {"demo": {"ttft_s": 8.0, "tpot_s": 0.25}},
    "default_slo_class": "demo",
}


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a client: when it ended, how long it took, and what was wrong with it."""

    at_s: float
    took_s: float
    wrong: str | None


class Traffic:
    """Clients that ask one after the other, each until told to stop."""

    def __init__(self, url: str, texts: list[str], right: dict[str, str]) -> None:
        self._url, self._texts, self._right = url, texts, right
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.asked: list[Asked] = []

    def ask(self, seed: int) -> None:
        """Ask until told to stop."""
        choose = random.Random(seed)
        while not self._stop.is_set():
            text = choose.choice(self._texts)
            began_s = time.monotonic()
            wrong = None
            try:
                answer = complete(self._url, text, max_tokens=TOKENS, model=MODEL_NAME)
                if answer.text != self._right[text]:
                    wrong = "wrong text"
            except AnswerError as error:
                wrong = str(error)[:200]
                time.sleep(0.2)
            took_s = time.monotonic() - began_s
            if wrong is None and took_s > SLOW_S:
                wrong = "slow"
            with self._lock:
                self.asked.append(Asked(time.monotonic(), took_s, wrong))

    def stop(self) -> None:
        """Let each client end with its answer."""
        self._stop.set()

    def since(self, at_s: float) -> list[Asked]:
        """Return the requests that ended after a moment."""
        with self._lock:
            return [a for a in self.asked if a.at_s >= at_s]


class Rollout:
    """The canary, by the commands that an operator types."""

    def __init__(self, policy: Path, url: str) -> None:
        self._policy, self._url = policy, url

    def command(self, *words: str) -> str:
        """Run ``disagg canary``; return what it printed."""
        argv = [sys.executable, "-m", "disagg_plugins.cli.main", "canary", words[0]]
        done = subprocess.run(
            [*argv, str(self._policy), *words[1:]],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            raise DisaggError(f"disagg canary {words[0]}: {done.stderr.strip()}")
        return done.stdout

    def look(self) -> dict[str, Any]:
        """Return the whole document."""
        with urllib.request.urlopen(f"{self._url}/internal/canary", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def wait(self, phases: tuple[str, ...], within_s: float) -> dict[str, Any]:
        """Return the document once the rollout is in one of the phases."""
        deadline_s = time.monotonic() + within_s
        told_s = 0.0
        while True:
            found = self.look()
            phase = found["progress"]["phase"]
            if phase in phases:
                return found
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise DisaggError(
                    f"waited {within_s:g} s for {' or '.join(phases)}; it is {phase} at "
                    f"{found['progress']['weight']} %: {'; '.join(found['lacks'])}"
                )
            if now_s - told_s > ANNOUNCE_S:
                told_s = now_s
                counted = found["counted"]
                say(
                    f"  {phase} at {found['progress']['weight']} %, {counted['baseline']} and "
                    f"{counted['candidate']} requests counted; {found['lacks'][:1]}"
                )
            time.sleep(1.0)


def install_damaged(folder: Path) -> dict[str, str]:
    """Make the damaged transport a plugin for whoever gets the environment that is returned."""
    place = folder / "plugins"
    info = place / "damaged_kv-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (place / "damaged_kv.py").write_text((DAMAGED / "damaged_kv.py").read_text())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged-kv\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[disagg_plugins]\ndamaged-kv = damaged_kv\n")
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "DAMAGED_KV_SWITCH": str(folder / "damage.on")}


def write_baseline(bed: Testbed) -> Path:
    """Write the policy of today's deployment, with the canary in it."""
    path = bed.folder / "baseline.yaml"
    worker = {"name": "monolith", "url": bed.urls["monolith"], "role": "both"}
    port = int(bed.gateway_url.rsplit(":", 1)[1])
    text = {
        "model": MODEL_NAME,
        "fleet": {"workers": [worker]},
        "gateway": {"port": port},
        "scheduler": SLO,
        "telemetry": {"records": "baseline.jsonl"},
        "canary": CANARY,
    }
    path.write_text(yaml.safe_dump(text))
    path.chmod(0o600)
    return path


@contextmanager
def slow_decode(bed: Testbed):
    """Let the decode worker work for a tenth of the time."""
    processes = engine_processes(bed, "decode")
    ended = threading.Event()

    def stutter() -> None:
        while not ended.is_set():
            for process in processes:
                process.suspend()
            ended.wait(0.9)
            for process in processes:
                process.resume()
            time.sleep(0.1)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def damaged_kv(bed: Testbed):
    """Damage a third of all KV that is handed over."""
    switch = bed.folder / "damage.on"
    switch.touch()
    try:
        yield
    finally:
        switch.unlink()


@contextmanager
def dead_prefill(bed: Testbed):
    """Kill the prefill worker; it stays dead."""
    for process in engine_processes(bed, "prefill"):
        os.kill(process.pid, signal.SIGKILL)
    yield


FAULTS: dict[str, Callable[[Testbed], Any]] = {
    "slow decode worker": slow_decode,
    "corrupted KV": damaged_kv,
    "failing prefill": dead_prefill,
}


def causes(hurt: list[Asked]) -> dict[str, int]:
    """Return what was wrong, and how often."""
    return dict(Counter((a.wrong or "")[:100] for a in hurt))


def promoted(rollout: Rollout, traffic: Traffic) -> dict[str, Any]:
    """Start a rollout and see it completed."""
    say("a rollout of the split deployment")
    began_s = time.monotonic()
    rollout.command("start", "--by", "demo")
    rollout.wait(("completed",), PROMOTE_S)
    asked = traffic.since(began_s)
    hurt = [a for a in asked if a.wrong]
    seconds = time.monotonic() - began_s
    say(f"completed after {seconds:.0f} s and {len(asked)} requests, {len(hurt)} of them hurt")
    return {
        "seconds": round(seconds, 1),
        "requests": len(asked),
        "hurt_requests": len(hurt),
        "hurt": causes(hurt),
    }


def faulty(name: str, bed: Testbed, rollout: Rollout, traffic: Traffic) -> dict[str, Any]:
    """Start a rollout, plant a fault in the candidate, and see it rolled back."""
    rollout.command("start", "--by", "demo")
    time.sleep(5.0)
    say(f"planted: {name}")
    began_s = time.monotonic()
    with FAULTS[name](bed):
        found = rollout.wait(("rolled_back", "aborted", "completed"), ROLLBACK_S)
        seconds = time.monotonic() - began_s
        asked = traffic.since(began_s)
    rolled_back = found["progress"]["phase"] == "rolled_back"
    why = "; ".join(found["decisions"][0]["why"])
    hurt = [a for a in asked if a.wrong]
    say(
        f"{'rolled back' if rolled_back else 'NOT ROLLED BACK'} after {seconds:.0f} s and "
        f"{len(asked)} requests, {len(hurt)} of them hurt: {why[:300]}"
    )
    return {
        "name": name,
        "rolled_back": rolled_back,
        "seconds": round(seconds, 1),
        "hurt_requests": len(hurt),
        "requests": len(asked),
        "hurt": causes(hurt),
        "why": why,
    }


def run(model: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """Start everything, ask without end, move the traffic; return the result."""
    for old in folder.glob("rollout.sqlite*"):
        old.unlink()
    (folder / "damage.on").unlink(missing_ok=True)
    env = install_damaged(folder.resolve())
    os.environ.update(env)  # the gateway knows the transport by name, too
    servers = [
        # one core each: threads on two cores that others use too wait for each other in vain
        Server("monolith", "monolith", (0,)),
        Server("prefill", "prefill", (1,), env=env),
        Server("decode", "decode", (1,), env=env),
    ]
    policy = {"scheduler": SLO, "handoff": HANDOFF}
    texts = list(prompts([80 + 10 * i for i in range(NUM_PROMPTS)], seed=5))
    bed = Testbed(folder, model, servers, flags=FLAGS, policy=policy, say=say)
    bed.serve_path = write_baseline(bed)
    with bed:
        right = {}
        for text in texts:
            answer = complete(bed.urls["monolith"], text, max_tokens=TOKENS, model=MODEL_NAME)
            right[text] = answer.text
        traffic = Traffic(bed.gateway_url, texts, right)
        rollout = Rollout(bed.serve_path, bed.gateway_url)
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(traffic.ask, seed) for seed in range(CLIENTS)]
            try:
                promotion = promoted(rollout, traffic)
                rollout.command("rollback", "--by", "demo", "--why", "room for the faults")
                faults = [faulty(name, bed, rollout, traffic) for name in names]
            finally:
                traffic.stop()
            for client in clients:
                client.result()
    return {"promoted": True, "promotion": promotion, "faults": faults}


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, default=Path("canary.json"))
    parser.add_argument("--folder", type=Path, default=Path(".run/demo-canary"))
    parser.add_argument("--faults", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of the gateway")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        result = run(args.model, args.folder, args.faults)
    except DisaggError as error:
        say(f"demo-canary: {error}")
        return 1
    say("measuring what a canary costs the gateway")
    benchmark = Path(__file__).resolve().parent / "benchmarks" / "canary.py"
    done = subprocess.run(
        [sys.executable, str(benchmark), "--rounds", str(args.rounds)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    costs = json.loads(done.stdout.splitlines()[-1])
    result["cpu_overhead_ratio"] = costs["request"]["on_ratio"]
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    good = all(fault["rolled_back"] for fault in result["faults"])
    print(f"written: {args.out}" + ("" if good else "; a fault was NOT rolled back"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
