from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.local import LocalFleet, WorkerFailed, healthy, tail_of
from disagg_plugins.policy import Policy

if TYPE_CHECKING:
    from disagg_plugins.policy import WorkerPolicy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a subreaper is needed to see orphans: Linux only"
)

SERVER = Path(__file__).with_name("server.py")


class ServerLauncher:
    """Starts the stand-in server with the worker's flags."""

    engine = "stand-in"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        assert worker.launch is not None
        port = worker.url.rpartition(":")[2]
        argv = (sys.executable, str(SERVER), "--port", port, *worker.launch.args)
        return LaunchCommand(argv, {"GREETING": "hello"})


MakeFleet = Callable[..., LocalFleet]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make_fleet(
    tmp_path: Path, free_port: Callable[[], int], said: list[str]
) -> Iterator[MakeFleet]:
    """Return a function: one list of flags a worker in, a fleet that is stopped at the end out."""
    fleets: list[LocalFleet] = []

    def make(*flags: list[str], start_s: float = 20, port: int | None = None) -> LocalFleet:
        workers = [
            {
                "name": f"w{index}",
                "url": f"http://127.0.0.1:{port or free_port()}",
                "engine": "stand-in",
                "role": "both",
                "launch": {"model": "m", "args": args, "start_s": start_s, "stop_s": 0.5},
            }
            for index, args in enumerate(flags)
        ]
        fleet = LocalFleet(
            Policy.model_validate({"fleet": {"workers": workers}}),
            tmp_path / "disagg.yaml",
            {"stand-in": ServerLauncher()},
            run_dir=tmp_path / "run",
            say=said.append,
        )
        fleets.append(fleet)
        return fleet

    yield make
    for fleet in fleets:
        fleet.stop()


OTHERS: set[psutil.Process] = set()
"""Children of this process that a test found: servers that other tests share."""


@pytest.fixture(autouse=True)
def children_of_other_tests() -> None:
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


def descendants() -> list[psutil.Process]:
    own = [child for child in psutil.Process().children() if child not in OTHERS]
    return [process for child in own for process in (child, *child.children(recursive=True))]


def test_workers_are_healthy_after_start_and_gone_after_stop(
    make_fleet: MakeFleet, said: list[str]
) -> None:
    with make_fleet([], []) as fleet:
        fleet.start()
        assert all(healthy(w.policy.url) for w in fleet.workers)
        urls = [w.policy.url for w in fleet.workers]
        assert len(descendants()) == 4  # a guard and a server each
    assert not any(healthy(url) for url in urls)
    assert not descendants()
    assert any(line.startswith("w1 is healthy after") for line in said)


@pytest.mark.parametrize("flags", [["--deaf"], ["--child"], ["--deaf", "--child"]], ids=" ".join)
def test_worker_that_does_not_want_to_end_is_gone_after_stop(
    make_fleet: MakeFleet, flags: list[str]
) -> None:
    with make_fleet(flags) as fleet:
        fleet.start()
        tree = descendants()
        assert len(tree) == (3 if "--child" in flags else 2)
    assert not [p for p in tree if p.is_running()]


def test_worker_that_ends_early_is_an_error_with_the_end_of_its_log(
    make_fleet: MakeFleet,
) -> None:
    with make_fleet([], ["--crash", "out of paper"]) as fleet:
        with pytest.raises(WorkerFailed, match="out of paper") as caught:
            fleet.start()
    assert caught.value.worker == "w1"
    assert "ended with code 3" in str(caught.value)
    assert str(caught.value.log) in str(caught.value)
    assert not descendants()


def test_worker_that_never_listens_is_an_error_that_names_the_time_out(
    make_fleet: MakeFleet,
) -> None:
    with make_fleet(["--never"], start_s=0.8) as fleet:
        with pytest.raises(WorkerFailed, match=r"within 0.8 s \(policy key launch.start_s\)"):
            fleet.start()
    assert not descendants()


def test_port_in_use_is_an_error_that_names_the_process(
    make_fleet: MakeFleet, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, str(SERVER), "--port", str(port)]) as other:
        try:
            deadline = time.monotonic() + 10
            while not healthy(f"http://127.0.0.1:{port}") and time.monotonic() < deadline:
                time.sleep(0.05)
            with make_fleet([], port=port) as fleet, pytest.raises(ConfigError) as caught:
                fleet.start()
        finally:
            other.kill()
    assert f"127.0.0.1:{port} is in use by process {other.pid}" in str(caught.value)
    assert "give the worker another port" in str(caught.value)
    assert not fleet.workers


def test_program_that_takes_the_port_during_the_start_is_not_taken_for_the_worker(
    make_fleet: MakeFleet, free_port: Callable[[], int]
) -> None:
    port = free_port()
    others: list[subprocess.Popen[bytes]] = []
    with make_fleet(["--never"], port=port) as fleet:
        fleet.say = lambda line: (
            others.append(subprocess.Popen([sys.executable, str(SERVER), "--port", str(port)]))
            if line.startswith("started")
            else None
        )
        with pytest.raises(ConfigError, match="is in use by process"):
            fleet.start()
    others[0].kill()
    others[0].wait()


def test_engine_without_launcher_is_an_error_that_names_those_there_are(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet([])
    fleet.launchers = {}
    with pytest.raises(ConfigError, match="no plugin can start the engine 'stand-in'"):
        fleet.start()


def test_worker_that_ends_later_is_told_of(make_fleet: MakeFleet, said: list[str]) -> None:
    told = threading.Event()
    with make_fleet([]) as fleet:
        fleet.start()
        fleet.say = lambda line: (said.append(line), told.set())
        fleet.watch()
        server = next(p for p in descendants() if str(SERVER) in p.cmdline()[:2])
        server.kill()
        assert told.wait(10)
    assert any("worker w0 ended with code 137" in line for line in said)


def test_stopping_twice_does_nothing_the_second_time(make_fleet: MakeFleet) -> None:
    fleet = make_fleet([])
    fleet.start()
    fleet.stop()
    fleet.stop()
    assert not fleet.workers


def test_environment_is_inherited_and_added_to(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
    with make_fleet([]) as fleet:
        fleet.start()
        server = next(p for p in descendants() if str(SERVER) in p.cmdline()[:2])
        environment = server.environ()
        commands = " ".join(word for p in descendants() for word in p.cmdline())
    assert environment["DISAGG_SECRET"] == "0123456789abcdef"
    assert environment["GREETING"] == "hello"
    assert "0123456789abcdef" not in commands


def test_no_file_descriptor_is_left(make_fleet: MakeFleet) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with make_fleet([], []) as fleet:
        fleet.start()
    assert len(os.listdir("/proc/self/fd")) == before


def test_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 200_000 + b"\n\nlast but one\nlast\xff\n\n")
    assert tail_of(log, 2) == ["last but one", "last�"]
    assert tail_of(tmp_path / "none") == []
