"""What tests of real engines look at: answers, metrics, work under way."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engines.testbed import Testbed

WAIT_S = 30.0
IDLE_LOOK_S = 1.0
ANSWER_S = 120.0


def until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {within_s} s for {what}"
        time.sleep(0.1)


def metric(url: str, name: str) -> float:
    """Return the sum of one metric over its labels on a server's own page."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    pattern = re.compile(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$")
    return sum(float(m[2]) for m in map(pattern.match, lines) if m)


def post(url: str, path: str, body: dict[str, Any], request_id: str = "") -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | (
        {"X-Request-Id": request_id} if request_id else {}
    )
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def status(bed: Testbed) -> dict[str, Any]:
    """Return what the gateway knows of its fleet."""
    with urllib.request.urlopen(f"{bed.gateway_url}/internal/status", timeout=10) as answer:
        return json.load(answer)


def in_flight(bed: Testbed, name: str) -> int:
    """Return the requests that the gateway has with a worker."""
    return next(int(w["requests"]) for w in status(bed)["workers"] if w["name"] == name)


def idle(bed: Testbed, names: Sequence[str] = ("prefill", "decode")) -> bool:
    """Return whether no worker computes: engines' own gauges stand still with the engine."""

    def cpu_s() -> float:
        times = [p.cpu_times() for name in names for p in bed.processes(name)]
        return sum(t.user + t.system for t in times)

    before_s = cpu_s()
    time.sleep(IDLE_LOOK_S)
    return cpu_s() - before_s < 0.2 * IDLE_LOOK_S


def engine_processes(bed: Testbed, name: str) -> list[Any]:
    """Return the processes that hold the model: the server's own tree without its front."""
    return [p for p in bed.processes(name) if p.memory_info().rss > 300 << 20]
