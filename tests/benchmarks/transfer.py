"""KV from a real SGLang prefill worker to a real SGLang decode worker: ours against mooncake's TCP.

``make bench NAME=transfer``, after ``make sglang`` and what this program asks for (mooncake). Two
pairs of SGLang servers with the same flags, prefill on one core and decode on the other: one pair
with this project's transfer backend, one with SGLang's own ``mooncake_tcp``. The same client sends
both halves of a request at once to either pair, as SGLang's small load balancer does; no gateway is
in between. All servers run all the time, and the pairs take turns, request by request or burst by
burst, so one pair computes while the other is idle. Prompts are the same, and so must be the
answers.

**After prefill**: from the end of the prompt's computation to the first token that the client has
from the decode worker. The first is ``prefill_finished_time`` of SGLang's own answer (stamped in
the scheduler before the last pages are handed to the backend), the second the client's clock; both
are this machine's wall clock. So neither the noise of seconds of prefill nor the moment at which a
prefill worker answers counts: with ours it answers when all is staged, with mooncake when decode
has it. In both, the figure holds what SGLang does beside the transfer: a turn of the decode
worker's loop, detokenizing, HTTP. *Cold* prompts are computed in chunks, and what was computed
first travels during the rest; *cached* ones are in the prefill worker's cache, so all their KV
travels after the end.

**CPU**: seconds of all processes of both workers per cached request, less what the same workers
take for the same request with SGLang's *fake* backend (prefill and decode each do their half,
nothing is moved). Cached, because the noise of computing a prompt is larger than a transfer. Left
out is the main loop of the decode worker: it spins, in every backend, from the moment it has its
half until the KV is there, mostly for the prefill (PyTorch's attention on a CPU computes the cached
part as well), and moves nothing itself; ``cpu_with_waiting_s`` has it. The prefill worker's loop is
in: it hands pages over and spins until the backend says that they are sent.

``disagg-shm`` is what this project does on one host. ``disagg-tcp`` is the like-for-like of
mooncake's TCP: the same publications, but the client tells decode their TCP address alone.
Ratios are mooncake over ours (for bytes per CPU-second: ours over mooncake), so above 1 ours is
better. The last line is one JSON object. Takes about five minutes on two
quiet cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from disagg_plugins.errors import DisaggError
from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.local import LocalFleet
from disagg_plugins.policy import load_policy
from disagg_sglang.launcher import POLICY_ENV, TRANSFER_BACKEND, WORKER_ENV, SglangLauncher
from disagg_sglang.room import Room, pack_room
from tests.corpus import prompts
from tests.engines.client import ANSWER_S
from tests.engines.probes import status, until
from tests.engines.testbed import (
    MODEL_NAME,
    SGLANG_CPU_KERNELS,
    SGLANG_DECODE_FLAGS,
    SGLANG_FLAGS,
    SGLANG_START_S,
    Server,
    Testbed,
    free_ports,
    sglang_env,
    sglang_python,
)

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy

MOONCAKE = "mooncake_tcp"
PACKAGE = "mooncake-transfer-engine-non-cuda"
MOONCAKE_ON_CPU = SGLANG_CPU_KERNELS.parent / "mooncake_on_cpu"
MOONCAKE_ENV = {"MC_TCP_BIND_ADDRESS": "127.0.0.1", "SGLANG_PLUGINS": "mooncake_on_cpu"}
"""Nothing but SGLang's defaults, on loopback, and none of this project in the process."""

FAKE_HOST = "2.2.2.2"
"""``FAKE_BOOTSTRAP_HOST`` of SGLang 0.5.23: the half is done, and nothing is transferred."""

KV_TOKENS = 8192
ANSWER_TOKENS = 8
INTRODUCED_S = 30.0
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 1 << 20


def say(line: str) -> None:
    """Print progress at once."""
    print(line, file=sys.stderr, flush=True)


# The servers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill worker and a decode worker.

    Attributes:
        urls: ``prefill`` and ``decode``.
        tree: Returns the processes of one of them.
    """

    urls: Mapping[str, str]
    tree: Callable[[str], list[psutil.Process]]


class MooncakeLauncher:
    """Starts SGLang as ``SglangLauncher`` does, but with SGLang's own backend."""

    engine = "sglang-mooncake"

    def __init__(self, bootstrap_port: int) -> None:
        self._port = str(bootstrap_port)

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the command; mooncake's bootstrap server listens, so it needs its own port."""
        command = SglangLauncher().command(worker, policy, policy_path)
        argv = list(command.argv)
        argv[argv.index(TRANSFER_BACKEND)] = MOONCAKE
        argv[argv.index("--disaggregation-bootstrap-port") + 1] = self._port
        env = {k: v for k, v in command.env.items() if k not in (POLICY_ENV, WORKER_ENV)}
        return LaunchCommand(tuple(argv), env)


def servers(chunk_tokens: int) -> tuple[Server, Server]:
    """Return the two workers of a pair."""
    chunk = ("--chunked-prefill-size", str(chunk_tokens))
    return (
        Server("prefill", "prefill", (0,), chunk, engine="sglang"),
        Server("decode", "decode", (1,), engine="sglang"),
    )


@contextmanager
def mooncake_pair(
    folder: Path, model: Path, flags: Sequence[str], pair: Sequence[Server], env: Mapping[str, str]
) -> Iterator[tuple[Pair, int]]:
    """Start the pair with SGLang's backend; yields it and its bootstrap port."""
    bootstrap_port, *ports = free_ports(1 + len(pair))
    workers = []
    for server, port in zip(pair, ports, strict=True):
        role_flags = SGLANG_DECODE_FLAGS if server.role == "decode" else ()
        args = [*SGLANG_FLAGS, *role_flags, "--max-total-tokens", str(KV_TOKENS), *flags]
        args += server.args
        own_env = sglang_env(server, args)
        own_env["PYTHONPATH"] += os.pathsep + str(MOONCAKE_ON_CPU)
        launch = {
            "model": str(model.resolve()),
            "cpus": list(server.cpus),
            "python": str(sglang_python()),
            "args": args,
            "env": {**own_env, **MOONCAKE_ENV, **env},
            "start_s": SGLANG_START_S,
        }
        url = f"http://127.0.0.1:{port}"
        worker = {"name": server.name, "url": url, "role": server.role, "launch": launch}
        workers.append({**worker, "engine": MooncakeLauncher.engine})
    path = folder.resolve() / "disagg.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"model": MODEL_NAME, "fleet": {"workers": workers}}))
    launchers = {MooncakeLauncher.engine: MooncakeLauncher(bootstrap_port)}
    with LocalFleet(
        load_policy(path), path, launchers, run_dir=path.parent / "logs", say=say
    ) as fleet:
        fleet.start()
        guards = {w.policy.name: psutil.Process(w.guard.pid) for w in fleet.workers}
        urls = {w["name"]: w["url"] for w in workers}
        yield Pair(urls, lambda name: guards[name].children(recursive=True)), bootstrap_port


# The arms: how the two halves of a request find each other ------------------------------------

Meeting = dict[str, dict[str, Any]]
"""For ``prefill`` and for ``decode``: the fields of the request that SGLang gives the backend."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of moving KV."""

    name: str
    pair: Pair
    meet: Callable[[], Meeting]


def fake() -> Meeting:
    """Both workers do their half alone."""
    room = {"bootstrap_host": FAKE_HOST, "bootstrap_room": secrets.randbits(60) + 1}
    return {"prefill": room, "decode": room}


def through_mooncake(port: int) -> Callable[[], Meeting]:
    """Return what meets at mooncake's bootstrap server."""

    def meet() -> Meeting:
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_room": secrets.randbits(60) + 1}
        return {name: {**room, "bootstrap_port": port} for name in ("prefill", "decode")}

    return meet


def through_ours(endpoints: list[dict[str, Any]], *transports: str) -> Callable[[], Meeting]:
    """Return what meets as the gateway would have it, by some of the transports."""
    chosen = [
        {**e, "addresses": {t: a for t, a in e["addresses"].items() if t in transports}}
        for e in endpoints
    ]

    def meet() -> Meeting:
        handoff_id = new_handoff_id()
        ticket = mint(
            os.environ["DISAGG_SECRET"].encode(),
            handoff_id=handoff_id,
            prefill="prefill",
            decode="decode",
            now_s=time.time(),
            valid_s=60.0,
        )
        number = int(handoff_id[:15], 16)
        rooms = {"prefill": Room(ticket), "decode": Room(ticket, endpoints=chosen)}
        return {
            name: {"bootstrap_host": pack_room(room), "bootstrap_room": number}
            for name, room in rooms.items()
        }

    return meet


# One request ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Half:
    """What one worker answered; times on the wall clock, as SGLang's."""

    first_s: float
    tokens: list[int]
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request did, in seconds."""

    after_prefill_s: float
    ttft_s: float
    tokens: list[int]
    cached_tokens: int


def half(url: str, body: dict[str, Any]) -> Half:
    """Stream one worker's answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate", json.dumps(body), headers)
        answer = connection.getresponse()
        first_s, tokens, meta = 0.0, [], {}
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            first_s = first_s or time.time()
            event = json.loads(line[6:])
            if "error" in event:
                raise DisaggError(f"{url}: {event['error']}")
            tokens, meta = event["output_ids"], event["meta_info"]
            if (meta["finish_reason"] or {}).get("type") == "abort":
                raise DisaggError(f"{url}: {meta['finish_reason']}")
        if answer.status != 200 or not tokens:
            raise DisaggError(f"{url} answered {answer.status} without a token")
        return Half(first_s, tokens, meta)
    finally:
        connection.close()


def request(pool: ThreadPoolExecutor, arm: Arm, ids: list[int], max_tokens: int) -> Answer:
    """Send both halves at once and wait for both."""
    sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
    rooms, started_s = arm.meet(), time.time()
    first = pool.submit(half, arm.pair.urls["prefill"], body | rooms["prefill"])
    second = half(arm.pair.urls["decode"], body | rooms["decode"])
    prefill = first.result().meta
    return Answer(
        second.first_s - prefill["prefill_finished_time"],
        second.first_s - started_s,
        second.tokens,
        int(prefill.get("cached_tokens", 0)),
    )


def forget(pair: Pair) -> None:
    """Empty the prefill worker's cache; it refuses for a moment after a request."""

    def flushed() -> bool:
        parts = urlsplit(pair.urls["prefill"])
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        connection.request("POST", "/flush_cache")
        done = connection.getresponse().status == 200
        connection.close()
        return done

    until(flushed, "the prefill worker to empty its cache")


# CPU time -----------------------------------------------------------------------------------------


CPU_PARTS = ("prefill_loop", "prefill_threads", "decode_loop", "decode_threads", "front")
"""Loops are the schedulers' main threads, which compute; ``front`` is all but the schedulers."""


def process_s(pid: int) -> float:
    """Return the CPU time of a process, ended threads included, in seconds.

    Linux's clock of another process, as ``clock_getcpuclockid(3)`` makes its id: nanoseconds,
    where ``/proc/<pid>/stat`` has hundredths of a second.
    """
    return time.clock_gettime((~pid << 3) | 2)


def main_thread_s(pid: int) -> float:
    """Return the CPU time of a process's main thread, in seconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def cpu_s(pair: Pair) -> dict[str, float]:
    """Return CPU time so far of both workers: their loops, other threads, other processes."""
    spent = dict.fromkeys(CPU_PARTS, 0.0)
    for name in ("prefill", "decode"):
        for process in pair.tree(name):
            whole_s = process_s(process.pid)
            if "scheduler" not in " ".join(process.cmdline()):
                spent["front"] += whole_s
                continue
            loop_s = main_thread_s(process.pid)
            spent[f"{name}_loop"] += loop_s
            spent[f"{name}_threads"] += whole_s - loop_s
    return spent


def less(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Return a - b, key by key."""
    return {key: a[key] - b[key] for key in a}


# The measurements -----------------------------------------------------------------------------


class Bench:
    """Measures arms that share prompts.

    Attributes:
        different: Answers that are not those of the first arm.
    """

    def __init__(self, arms: Sequence[Arm], without: Sequence[Arm]) -> None:
        self.arms = arms
        self.without = without
        self.different = 0
        self._pool = ThreadPoolExecutor(1)

    def cold(self, texts: Sequence[list[int]]) -> dict[str, list[Answer]]:
        """Send every prompt to every arm; the prefill worker computes it anew each time."""
        answers: dict[str, list[Answer]] = {arm.name: [] for arm in self.arms}
        for i, ids in enumerate(texts):
            for arm in rotated(self.arms, i):
                forget(arm.pair)
                answers[arm.name].append(request(self._pool, arm, ids, ANSWER_TOKENS))
            told = [answers[arm.name][-1].tokens for arm in self.arms]
            self.different += sum(tokens != told[0] for tokens in told)
        return answers

    def cached(
        self, ids: list[int], rounds: int, burst: int
    ) -> tuple[dict[str, list[Answer]], dict[str, dict[str, float]]]:
        """Send one prompt in bursts; return answers, and net CPU-seconds a request."""
        arms = [*self.arms, *self.without]
        answers: dict[str, list[Answer]] = {arm.name: [] for arm in arms}
        spent: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
        for pair in {id(arm.pair): arm for arm in self.arms}.values():
            request(self._pool, pair, ids, 1)
        for i in range(rounds):
            for arm in rotated(arms, i):
                request(self._pool, arm, ids, 2)
                before = cpu_s(arm.pair)
                for _ in range(burst):
                    answers[arm.name].append(request(self._pool, arm, ids, 2))
                used = less(cpu_s(arm.pair), before)
                spent[arm.name].append({k: v / burst for k, v in used.items()})
        for name, got in answers.items():
            if any(a.cached_tokens < len(ids) - 1 for a in got):
                raise DisaggError(f"{name}: a prompt was not in the prefill worker's cache")
        told = answers[self.arms[0].name][0].tokens
        self.different += sum(a.tokens != told for arm in self.arms for a in answers[arm.name])
        median = {
            name: {k: statistics.median(row[k] for row in rows) for k in rows[0]}
            for name, rows in spent.items()
        }
        base = {id(arm.pair): median[arm.name] for arm in self.without}
        net = {arm.name: less(median[arm.name], base[id(arm.pair)]) for arm in self.arms}
        return answers, {**net, **{arm.name: median[arm.name] for arm in self.without}}


def rotated(arms: Sequence[Arm], by: int) -> list[Arm]:
    """Return the arms, beginning elsewhere."""
    by %= len(arms)
    return [*arms[by:], *arms[:by]]


def bytes_a_token(model: Path, dtype: str) -> int:
    """Return the KV of one token, in bytes: K and V of every layer."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads", heads)
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * DTYPE_BYTES[dtype])


def idle_cpu(arms: Sequence[Arm], seconds: float = 3.0) -> dict[str, float]:
    """Return how many cores each pair takes while nothing is asked of it."""
    before = [cpu_s(arm.pair) for arm in arms]
    time.sleep(seconds)
    return {
        arm.name: sum(less(cpu_s(arm.pair), then).values()) / seconds
        for arm, then in zip(arms, before, strict=True)
    }


def row_of(bench: Bench, texts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Measure prompts of one length."""
    cold = bench.cold(texts)
    cached, cpu = bench.cached(texts[0], args.rounds, args.burst)
    tokens = len(texts[0])
    payload = tokens * bytes_a_token(args.model, args.dtype)
    arms = {}
    for name in cold:
        net = cpu[name]
        transfer_s = sum(net.values()) - net["decode_loop"]
        arms[name] = {
            **spread("cold_after_prefill_s", (a.after_prefill_s for a in cold[name])),
            **spread("cold_ttft_s", (a.ttft_s for a in cold[name])),
            **spread("cached_after_prefill_s", (a.after_prefill_s for a in cached[name])),
            **spread("cached_ttft_s", (a.ttft_s for a in cached[name])),
            "cpu_s": transfer_s,
            "cpu_with_waiting_s": sum(net.values()),
            "cpu_parts_s": net,
            "mib_per_cpu_s": payload / MIB / transfer_s,
        }
        say(f"{tokens:5d} tokens  {name:<11}{show(arms[name])}")
    without = {arm.name: sum(cpu[arm.name].values()) for arm in bench.without}
    row = {"prompt_tokens": tokens, "bytes": payload, "arms": arms, "cpu_s_without": without}
    for name in cold:
        if name != "mooncake":
            row[f"ratios_{name}"] = ratios(arms[name], arms["mooncake"])
    return row


def spread(key: str, values: Iterable[float]) -> dict[str, Any]:
    """Return the median under ``key``, and the smallest and the largest value beside it."""
    found = sorted(values)
    return {key: statistics.median(found), f"{key}_range": [found[0], found[-1]]}


def show(arm: Mapping[str, Any]) -> str:
    """Return one line of the table, in milliseconds."""
    parts = {key: 1000 * value for key, value in arm["cpu_parts_s"].items()}
    threads = parts["prefill_threads"] + parts["decode_threads"]
    return (
        f" first token after prefill, ms: cold {1000 * arm['cold_after_prefill_s']:5.1f}"
        f"  cached {1000 * arm['cached_after_prefill_s']:5.1f}"
        f"   CPU, ms: {1000 * arm['cpu_s']:5.1f} (threads {threads:5.1f})"
        f"  decode waits {parts['decode_loop']:6.1f}   {arm['mib_per_cpu_s']:5.0f} MiB/CPU-s"
    )


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Return ratios that are above 1 where ours is better."""
    lower = (
        *("cold_after_prefill_s", "cold_ttft_s", "cached_after_prefill_s", "cached_ttft_s"),
        "cpu_with_waiting_s",
    )
    return {
        **{key.removesuffix("_s"): theirs[key] / ours[key] for key in lower},
        "bytes_per_cpu_s": ours["mib_per_cpu_s"] / theirs["mib_per_cpu_s"],
    }


def what_is_missing() -> str:
    """Return what to install, or an empty string."""
    python = sglang_python()
    if not python.exists():
        return f"there is no {python}: run make sglang"
    probe = [str(python), "-c", "import mooncake.engine"]
    found = subprocess.run(probe, capture_output=True, text=True, timeout=120, check=False)
    if found.returncode == 0:
        return ""
    lines = found.stderr.strip().splitlines() or [""]
    return (
        f"mooncake does not load ({lines[-1]}). Install what the comparison needs:\n"
        f"  uv pip install --python {python} {PACKAGE}\n"
        "  apt-get install libibverbs1    # or its like: mooncake links it for TCP as well"
    )


def ours_and_theirs(bed: Testbed, mooncake: Pair, port: int) -> Bench:
    """Return the arms, when our prefill worker has told where it serves KV."""

    def hello() -> list[Any]:
        return [w["hello"] for w in status(bed)["workers"] if w["name"] == "prefill"]

    until(lambda: all(hello()), "the prefill worker to tell of itself", INTRODUCED_S)
    endpoints = [h["endpoint"] for h in hello()]
    pair = Pair(bed.urls, bed.processes)
    arms = [
        Arm("disagg-shm", pair, through_ours(endpoints, "shm", "tcp")),
        Arm("disagg-tcp", pair, through_ours(endpoints, "tcp")),
        Arm("mooncake", mooncake, through_mooncake(port)),
    ]
    without = [Arm("disagg-fake", pair, fake), Arm("mooncake-fake", mooncake, fake)]
    return Bench(arms, without)


def main() -> int:
    """Start both pairs, let them take turns, print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--folder", type=Path, default=Path(".run/transfer"))
    parser.add_argument("--dtype", default="float32", choices=DTYPE_BYTES)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--prompts", type=int, default=4, help="of each length, sent cold")
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each arm and length")
    parser.add_argument("--burst", type=int, default=4, help="cached requests a burst")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument(
        "--mooncake-env", nargs="*", default=[], metavar="NAME=VALUE", help="settings of mooncake's"
    )
    args = parser.parse_args()
    if missing := what_is_missing():
        print(missing, file=sys.stderr)
        return 2
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(args.model).encode
    flags = ("--dtype", args.dtype, "--context-length", "2048", "--enable-metrics")
    pair = servers(args.chunk_tokens)
    env = dict(setting.partition("=")[::2] for setting in args.mooncake_env)
    rows = []
    with (
        Testbed(
            args.folder / "disagg",
            args.model,
            pair,
            sglang_flags=flags,
            kv_tokens=KV_TOKENS,
            say=say,
        ) as bed,
        mooncake_pair(args.folder / "mooncake", args.model, flags, pair, env) as (theirs, port),
    ):
        bench = ours_and_theirs(bed, theirs, port)
        idle = idle_cpu(bench.without)
        for length in args.prompt_tokens:
            texts = prompts([2 * length] * args.prompts, seed=length)
            rows.append(row_of(bench, [list(encode(t)[:length]) for t in texts], args))
    for row in rows:
        for name, arm in row["arms"].items():
            print(f"{row['prompt_tokens']:5d} tokens  {name:<11}{show(arm)}")
    result = {
        "dtype": args.dtype,
        "chunk_tokens": args.chunk_tokens,
        "mooncake_env": env,
        "idle_cores": {name.removesuffix("-fake"): cores for name, cores in idle.items()},
        "different_answers": bench.different,
        "rows": rows,
    }
    print(json.dumps(result))
    return 0 if bench.different == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
