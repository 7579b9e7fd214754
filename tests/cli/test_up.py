from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from disagg_plugins.testing.fake_engine import FakeEngine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a subreaper is needed to see orphans: Linux only"
)

WritePolicy = Callable[..., Path]

SECRET = {"DISAGG_SECRET": "0123456789abcdef-for-tests"}

FAKE_PYTHON = f"""#!{sys.executable}
import sys
from disagg_plugins.testing.fake_process import run
port, model = (sys.argv[sys.argv.index(f) + 1] for f in ("--port", "--served-model-name"))
sys.argv = ["fake_engine", "--port", port, "--model", model]
run()
"""
"""Stands where a policy names an interpreter, and starts a pretend engine instead of vLLM."""


@pytest.fixture
def policy(tmp_path: Path, write_policy: WritePolicy) -> Path:
    """Write a policy whose workers `disagg up` can start without an engine."""
    engine = tmp_path / "fake-python"
    engine.write_text(FAKE_PYTHON)
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    return write_policy(launch={"model": "m", "python": "./fake-python", "stop_s": 3})


@contextmanager
def running(
    policy: Path, *command: str, env: dict[str, str] | None = None, **popen: Any
) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], list[str]]]]:
    """Run ``disagg``; yield the process and a function that reads its output up to a line."""
    environ = {k: v for k, v in os.environ.items() if k != "DISAGG_SECRET"}
    with subprocess.Popen(
        [sys.executable, "-m", "disagg_plugins.cli.main", *command, str(policy)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=policy.parent,
        env={**environ, **(env or {})},
        **popen,
    ) as process:
        assert process.stderr is not None
        errors = process.stderr

        def read_until(text: str) -> list[str]:
            lines = []
            while line := errors.readline():
                lines.append(line.rstrip("\n"))
                if text in line:
                    return lines
            raise AssertionError(f"{text!r} was never said: {lines}")

        try:
            yield process, read_until
        finally:
            process.kill()


def ask(policy: Path, path: str, body: Any = None) -> tuple[int, Any]:
    port = yaml.safe_load(policy.read_text())["gateway"]["port"]
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {within_s} s"
        time.sleep(0.05)


def ended(process: psutil.Process) -> bool:
    """Whether a process is gone; a zombie that nobody reaps counts as gone."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_up_starts_all_answers_a_request_and_leaves_nothing(policy: Path) -> None:
    with running(policy, "up") as (process, read_until):
        said = read_until("gateway listens")
        assert "DISAGG_SECRET is not set: made a secret for this run" in said
        wait_until(lambda: ask(policy, "/ready")[0] == 200, "a ready fleet")
        body = {"model": "fake-model", "prompt": "Hello", "max_tokens": 3}
        status, answer = ask(policy, "/v1/completions", body)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 3
        tree = psutil.Process(process.pid).children(recursive=True)
        assert len(tree) == 4  # a guard and a server for each of two workers
        process.send_signal(signal.SIGTERM)
        read_until("stopping p0, d0")
        assert process.wait(20) == 0
        assert all(ended(p) for p in tree)
    assert (policy.parent / ".run" / "p0.log").is_file()


def test_up_killed_with_sigkill_leaves_no_process(policy: Path) -> None:
    with running(policy, "up") as (process, read_until):
        read_until("gateway listens")
        tree = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        wait_until(lambda: all(ended(p) for p in tree), "the end of every worker")


def test_interrupt_while_workers_start_leaves_no_process(policy: Path) -> None:
    (policy.parent / "fake-python").write_text(
        f"#!{sys.executable}\nimport time\ntime.sleep(600)\n"
    )
    with running(policy, "up") as (process, read_until):
        read_until("started d0")
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert all(ended(p) for p in tree)


def test_interrupt_ends_a_background_job_of_a_shell_too(policy: Path) -> None:
    def as_a_shell_starts_it() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    with running(policy, "up", "--workers-only", preexec_fn=as_a_shell_starts_it) as (
        process,
        read_until,
    ):
        read_until("workers are ready")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_workers_only_starts_no_gateway(policy: Path) -> None:
    with running(policy, "up", "--workers-only") as (process, read_until):
        read_until("workers are ready")
        with pytest.raises(ConnectionRefusedError):
            ask(policy, "/health")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130


def test_worker_that_crashes_is_an_error_with_its_log(disagg: Any, policy: Path) -> None:
    (policy.parent / "fake-python").write_text(f"#!{sys.executable}\nraise SystemExit('no KV')\n")
    done = disagg("up", policy, cwd=policy.parent)
    assert done.returncode == 1
    assert "disagg: error: worker" in done.stderr
    assert "| no KV" in done.stderr
    assert "Traceback" not in done.stderr


def test_policy_that_starts_nothing_is_an_error(disagg: Any, write_policy: WritePolicy) -> None:
    done = disagg("up", write_policy(), env=SECRET)
    assert done.returncode == 2
    assert "no worker has a launch section" in done.stderr


def test_secret_is_not_made_for_workers_that_run_elsewhere(
    disagg: Any, write_policy: WritePolicy
) -> None:
    path = write_policy(secret={"env": "DISAGG_NOT_SET"})
    done = disagg("up", path)
    assert done.returncode == 2
    assert "DISAGG_NOT_SET is not set" in done.stderr


@pytest.mark.parametrize(("secret", "held"), [("short", 5), ("", 0)])
def test_secret_that_is_too_short_is_told_as_that(
    disagg: Any, policy: Path, secret: str, held: int
) -> None:
    done = disagg("up", policy, env={"DISAGG_SECRET": secret})
    assert done.returncode == 2
    assert f"DISAGG_SECRET holds {held} bytes, a secret needs at least 16" in done.stderr
    assert "not set" not in done.stderr
    assert "started" not in done.stderr


def test_serve_answers_before_workers_that_run_and_drains(write_policy: WritePolicy) -> None:
    with FakeEngine() as p0, FakeEngine() as d0:
        policy = write_policy((p0.url, d0.url), telemetry={"records": "records.jsonl"})
        with running(policy, "serve", env=SECRET) as (process, read_until):
            read_until("gateway listens")
            wait_until(lambda: ask(policy, "/ready")[0] == 200, "a ready fleet")
            status, _ = ask(policy, "/v1/completions", {"model": "fake-model", "prompt": "Hi"})
            assert status == 200
            process.send_signal(signal.SIGTERM)
            read_until("draining for at most 2 s")
            assert process.wait(20) == 0
        record = json.loads((policy.parent / "records.jsonl").read_text().splitlines()[0])
        assert record["route"] == "local"


def test_live_doctor_finds_a_split_that_does_not_happen(
    disagg: Any, write_policy: WritePolicy
) -> None:
    # These engines hand their KV over in words only: no connector ever reports a load.
    with FakeEngine() as p0, FakeEngine() as d0:
        policy = write_policy((p0.url, d0.url), telemetry={"report_wait_s": 0.1})
        with running(policy, "serve", env=SECRET) as (_, read_until):
            read_until("gateway listens")
            # Ready is a gateway that can answer: with decode alone it would answer unsplit.
            wait_until(
                lambda: all(w["healthy"] for w in ask(policy, "/internal/status")[1]["workers"]),
                "a healthy fleet",
            )
            body = {"model": "fake-model", "prompt": list(range(300)), "max_tokens": 2}
            assert ask(policy, "/v1/completions", body)[0] == 200
            port = yaml.safe_load(policy.read_text())["gateway"]["port"]
            url = f"http://127.0.0.1:{port}"
            wait_until(
                lambda: ask(policy, "/internal/status")[1]["split"]["recent_requests"] == 1,
                "the record",
            )
            done = disagg("doctor", "--live", url)
    assert done.returncode == 1
    assert "PROBLEM  split: 1 of 1 split requests loaded no KV" in done.stdout
    assert "PROBLEM  connector: never heard of the connector in p0, d0" in done.stdout


def test_gateway_port_in_use_is_an_error_in_one_line(
    disagg: Any, write_policy: WritePolicy
) -> None:
    with FakeEngine() as other:
        port = int(other.url.rpartition(":")[2])
        path = write_policy(gateway={"port": port})
        done = disagg("serve", path, env=SECRET)
    assert done.returncode == 2
    assert f"gateway.port: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
