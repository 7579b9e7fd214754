"""What the gateway costs, side by side with vllm-router, before the same fast fake backend.

Both proxies do prefill, then decode. Only the proxy's own CPU time (user and system) is counted,
so the cost of client and backend is not in the figures. A chunk's cost is the slope between two
lengths of streams, a request's cost what is left at length zero. Rounds alternate between the two
proxies; medians are reported. The last line is one JSON object. Progress goes to stderr. Takes
about three minutes on a quiet machine and never more than ``WHOLE_S``: on a busy one, fewer rounds
are measured, and the JSON tells how many, and how busy the machine was.

    .venvs/dev/bin/python tests/benchmarks/gateway.py [--quick] [--only ours]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httptools
import psutil
import uvloop

ROOT = Path(__file__).resolve().parents[2]
VENVS = (ROOT / ".venvs" / "bench-router", ROOT / ".venvs" / "bench")
SHORT_TOKENS, LONG_TOKENS = 8, 136
CHUNK_S = 0.002
CONCURRENT = 8
PROMPT = "word " * 400
START_S = 30.0
REQUEST_S = 60.0
PHASE_S = 60.0
"""Bound on one measurement; reaching it ends the benchmark with the measurement's name."""

ROUNDS_S = 100.0
"""No new round begins after this, counted from the first; two are always done."""

GROWTH_S = 30.0
"""Bound on the requests of one proxy over which memory is watched."""

WARM_UP = 20_000
"""Requests of one proxy before its memory is watched."""

WHOLE_S = 236.0
"""Bound on the whole run, start and end of the processes included."""

BEGAN_S = time.monotonic()


def say(what: str) -> None:
    """Tell on stderr how far it is."""
    print(f"[{time.monotonic() - BEGAN_S:5.1f} s] {what}", file=sys.stderr, flush=True)


@asynccontextmanager
async def phase(what: str, bound_s: float = PHASE_S) -> AsyncIterator[None]:
    """Name a measurement and bound it."""
    say(what)
    try:
        async with asyncio.timeout(bound_s):
            yield
    except TimeoutError as exc:
        raise SystemExit(f"{what}: not done within {bound_s:g} s; the machine is busy") from exc


def free_port() -> int:
    while True:  # below the range from which the kernel takes ports of outgoing connections
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def payload(tokens: int, *, stream: bool, chunk_s: float | None = None) -> bytes:
    body: dict[str, object] = {
        "model": "fake-model",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": stream,
        "temperature": 0.7,
    }
    if chunk_s is not None:
        body["fake_chunk_s"] = (
            chunk_s  # the fake engine's own pace would be half a million a second
        )
    raw = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"user-agent: bench\r\naccept: */*\r\nauthorization: Bearer none\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(raw), raw)
    )


class Client(asyncio.Protocol):
    """Sends requests one after the other on one connection."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] | None = None
        self.sent_s = self.first_s = 0.0
        self.failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self.first_s:
            self.first_s = time.perf_counter()

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() != 200:
            self.failed += 1
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("the proxy closed the connection"))

    async def ask(self, request: bytes) -> float:
        """Send and wait for the whole answer; return the TTFT in seconds."""
        self.done = asyncio.get_running_loop().create_future()
        self.first_s = 0.0
        self.sent_s = time.perf_counter()
        self.transport.write(request)  # type: ignore[attr-defined]
        await asyncio.wait_for(self.done, REQUEST_S)
        return self.first_s - self.sent_s


async def connect(port: int) -> Client:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(Client, "127.0.0.1", port)
    return client


async def load(port: int, request: bytes, count: int, concurrent: int) -> float:
    """Send ``count`` requests; return the seconds that it took."""
    left = count
    clients = [await connect(port) for _ in range(concurrent)]

    async def work(client: Client) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await client.ask(request)

    begin_s = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(work(client))
    seconds = time.perf_counter() - begin_s
    for client in clients:
        client.transport.close()  # type: ignore[attr-defined]
        if client.failed:
            raise SystemExit(f"{client.failed} requests failed on port {port}")
    return seconds


async def ttft(port: int, request: bytes, count: int) -> float:
    """Return the median TTFT of one request at a time, in seconds."""
    client = await connect(port)
    times = [await client.ask(request) for _ in range(count)]
    client.transport.close()  # type: ignore[attr-defined]
    return statistics.median(times[len(times) // 5 :])


async def direct_ttft(prefill: int, decode: int, count: int) -> float:
    """Return the median TTFT of a client that calls prefill, then decode itself."""
    first, second = await connect(prefill), await connect(decode)
    times = []
    for _ in range(count):
        begin_s = time.perf_counter()
        await first.ask(payload(1, stream=False))
        await second.ask(payload(2, stream=True))
        times.append(second.first_s - begin_s)
    for client in (first, second):
        client.transport.close()  # type: ignore[attr-defined]
    return statistics.median(times[len(times) // 5 :])


class Proxy:
    """A running proxy and the CPU time of its process."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.port = port
        self.process = psutil.Process(process.pid)
        self.chunk_us: list[float] = []
        self.request_us: list[float] = []
        self.whole_us: list[float] = []
        self.ttft_s: list[float] = []
        self.rates: list[float] = []

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    async def cost_us(self, request: bytes, count: int, concurrent: int = CONCURRENT) -> float:
        """Return CPU microseconds a request."""
        before_s = self.cpu_s()
        await load(self.port, request, count, concurrent)
        return (self.cpu_s() - before_s) / count * 1e6

    def rss_mib(self) -> float:
        return float(self.process.memory_info().rss) / (1 << 20)


def start(
    stack: ExitStack, command: list[str], env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=ROOT)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(stop)
    return process


def wait_ready(port: int, path: str, what: str) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{what} was not ready within {START_S:g} s")


def seen(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/seen", timeout=5) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


OURS = """
import os, sys, logging
from pathlib import Path
from disagg_plugins import hookimpl
from disagg_plugins.gateway.app import run
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_vllm.dialect import VllmDialect
class Vllm:
    @hookimpl
    def disagg_register_dialects(self):
        return [VllmDialect()]
port, prefill, decode, records = sys.argv[1:]
policy = Policy.model_validate({
    "scheduler": {"split": {"rule": "always"}},  # one prompt again and again is soon cached
    "fleet": {"workers": [
        {"name": "p0", "url": f"http://127.0.0.1:{prefill}", "role": "prefill", "capacity": 4096},
        {"name": "d0", "url": f"http://127.0.0.1:{decode}", "role": "decode", "capacity": 4096},
    ]},
    "gateway": {"port": int(port)},
})
host = PluginHost.load(policy.plugins, entry_points=False, extra=[("bench_vllm", Vllm())])
run(policy, host, secret=b"0123456789abcdef0123456789abcdef", records_path=Path(records))
"""


def router_binary() -> Path | None:
    """Return vllm-router, installed into an environment of its own when it is not there."""
    for venv in VENVS:
        if (venv / "bin" / "vllm-router").exists():
            return venv / "bin" / "vllm-router"
    uv = shutil.which("uv")
    if uv is None:
        return None
    venv = VENVS[0]
    python = str(venv / "bin" / "python")
    subprocess.run([uv, "venv", "-q", "--python", "3.11", str(venv)], check=True)
    done = subprocess.run(
        [uv, "pip", "install", "-q", "--python", python, "vllm-router"], check=False
    )
    return venv / "bin" / "vllm-router" if done.returncode == 0 else None


def start_all(stack: ExitStack, only: str | None) -> tuple[list[Proxy], int, int]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/adapters:{ROOT}/connectors"}
    fake = [sys.executable, "-m", "disagg_plugins.testing.fake_engine"]
    prefill, decode = free_port(), free_port()
    for name, port in (("prefill", prefill), ("decode", decode)):
        command = [*fake, "--port", str(port), "--chunk-s", str(CHUNK_S)]
        start(stack, command, env, folder / f"{name}.log")
        wait_ready(port, "/health", name)
    proxies = []
    if only in (None, "ours"):
        port = free_port()
        arguments = [str(port), str(prefill), str(decode), str(folder / "records.jsonl")]
        process = start(stack, [sys.executable, "-c", OURS, *arguments], env, folder / "ours.log")
        wait_ready(port, "/ready", "the gateway")
        proxies.append(Proxy("ours", port, process))
    binary = router_binary() if only in (None, "router") else None
    if binary is not None:
        port = free_port()
        command = [
            str(binary), "--host", "127.0.0.1", "--port", str(port), "--vllm-pd-disaggregation",
            "--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}",
            "--policy", "round_robin", "--prometheus-port", str(free_port()),
            "--worker-startup-check-interval", "1", "--log-level", "error",
            "--max-concurrent-requests", "4096",
        ]  # fmt: skip
        process = start(stack, command, env, folder / "router.log")
        wait_ready(port, "/health", "vllm-router")
        proxies.append(Proxy("vllm-router", port, process))
    return proxies, prefill, decode


async def check_split(proxy: Proxy, prefill: int, decode: int) -> None:
    """Refuse to measure a proxy that does not call prefill and then decode."""
    before = seen(prefill)["prefills"], seen(decode)["decodes"]
    await load(proxy.port, payload(2, stream=True), 10, 1)
    after = seen(prefill)["prefills"], seen(decode)["decodes"]
    if after[0] - before[0] != 10 or after[1] - before[1] != 10:
        raise SystemExit(f"{proxy.name} does not split: {before} -> {after}")


async def rounds(proxies: list[Proxy], prefill: int, decode: int, quick: bool) -> float:
    count = 120 if quick else 200
    direct = []
    begin_s = time.monotonic()
    for number in range(2 if quick else 6):
        if number >= 2 and time.monotonic() - begin_s > ROUNDS_S:
            say("no time for more rounds")
            break
        async with phase(f"round {number}: direct"):
            direct.append(await direct_ttft(prefill, decode, 100))
        for proxy in proxies:
            async with phase(f"round {number}: {proxy.name}"):
                await one_round(proxy, count, keep=number > 0)  # the first one warms up
    return statistics.median(direct)


async def one_round(proxy: Proxy, count: int, *, keep: bool) -> None:
    short_us = await proxy.cost_us(payload(SHORT_TOKENS, stream=True), 4 * count)
    long_us = await proxy.cost_us(payload(LONG_TOKENS, stream=True), count)
    chunk_us = (long_us - short_us) / (LONG_TOKENS - SHORT_TOKENS)
    whole_us = await proxy.cost_us(payload(1, stream=False), 4 * count)
    times_s = await ttft(proxy.port, payload(2, stream=True), 150)
    if not keep:
        return
    proxy.chunk_us.append(chunk_us)
    proxy.request_us.append(short_us - SHORT_TOKENS * chunk_us)
    proxy.whole_us.append(whole_us)
    proxy.ttft_s.append(times_s)
    seconds = await load(proxy.port, payload(1, stream=False), 1000, 32)
    proxy.rates.append(1000 / seconds)


async def memory(proxy: Proxy, quick: bool) -> dict[str, float]:
    """Measure resident memory over many requests and with 1,000 open streams."""
    async with phase(f"memory: {proxy.name}, warming up"):
        # Enough to fill the ledger: these workers never report, so a handoff waits there for
        # report_wait_s (2 s), which is 10,000 handoffs at 5,000 requests a second.
        await load(proxy.port, payload(1, stream=False), 1000 if quick else WARM_UP, 32)
    before = proxy.rss_mib()
    count = 1000 if quick else 10_000
    grown, end_s = 0, time.monotonic() + GROWTH_S
    while grown < count and time.monotonic() < end_s:
        async with phase(f"memory: {proxy.name}, {grown} of {count} requests"):
            await load(proxy.port, payload(1, stream=False), 1000, 32)
        grown += 1000
    after = proxy.rss_mib()
    say(f"memory: {proxy.name}, 1000 streams")
    clients = [await connect(proxy.port) for _ in range(1000)]
    request = payload(2000, stream=True, chunk_s=0.5)
    peak = 0.0
    for client in clients:
        client.transport.write(request)  # type: ignore[attr-defined]
    for _ in range(80):
        await asyncio.sleep(0.1)
        peak = max(peak, proxy.rss_mib())
    opened = sum(c.first_s > 0 for c in clients)
    for client in clients:
        client.transport.abort()  # type: ignore[attr-defined]
    await asyncio.sleep(1.0)
    return {
        "rss_before_mib": round(before, 1),
        "rss_growth_mib": round(after - before, 2),
        "rss_growth_requests": grown,
        "rss_1000_streams_mib": round(peak, 1),
        "streams_open": opened,
    }


def table(
    proxies: list[Proxy], direct_s: float, memories: dict[str, dict[str, float]]
) -> list[dict[str, object]]:
    middle = statistics.median
    rows: list[dict[str, object]] = [{"name": "direct", "ttft_ms": round(direct_s * 1e3, 3)}]
    for p in proxies:
        rows.append(
            {
                "name": p.name,
                "cpu_us_per_chunk": round(middle(p.chunk_us), 1),
                "cpu_us_per_request": round(middle(p.request_us), 1),
                "cpu_us_per_whole_request": round(middle(p.whole_us), 1),
                "ttft_ms": round(middle(p.ttft_s) * 1e3, 3),
                "ttft_added_ms": round((middle(p.ttft_s) - direct_s) * 1e3, 3),
                "requests_per_s": round(middle(p.rates)),
                "rounds": len(p.rates),
                **memories[p.name],
            }
        )
    return rows


async def measure(quick: bool, only: str | None) -> dict[str, object]:
    with ExitStack() as stack:
        proxies, prefill, decode = start_all(stack, only)
        for proxy in proxies:
            async with phase(f"check: {proxy.name} splits"):
                await check_split(proxy, prefill, decode)
        direct_s = await rounds(proxies, prefill, decode, quick)
        memories = {p.name: await memory(p, quick) for p in proxies}
        rows = table(proxies, direct_s, memories)
    by = {str(row["name"]): row for row in rows}
    for row in rows:
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    load_average = round(os.getloadavg()[0], 2)
    result: dict[str, object] = {"table": rows, "load_average_1min": load_average}
    ours, theirs = by.get("ours"), by.get("vllm-router")
    for key, column in (
        ("cpu_per_chunk_vs_vllm_router", "cpu_us_per_chunk"),
        ("cpu_per_request_vs_vllm_router", "cpu_us_per_request"),
        ("ttft_added_vs_vllm_router", "ttft_added_ms"),
    ):
        known = ours is not None and theirs is not None
        result[key] = (
            round(float(str(ours[column])) / float(str(theirs[column])), 3) if known else None
        )  # type: ignore[index]
    return result


async def bounded(quick: bool, only: str | None) -> dict[str, object]:
    async with phase("the whole benchmark", WHOLE_S):
        return await measure(quick, only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: rough figures")
    parser.add_argument("--only", choices=["ours", "router"])
    given = parser.parse_args()
    print(json.dumps(uvloop.run(bounded(given.quick, given.only))))


if __name__ == "__main__":
    main()
