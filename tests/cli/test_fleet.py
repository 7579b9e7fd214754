"""``disagg fleet`` against a running gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from disagg_plugins.cli.main import main
from disagg_plugins.testing.fake_engine import FakeEngine
from tests.gateway.harness import SECRET, Stack, build_stack, eventually

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with ExitStack() as stack:
        yield build_stack(stack, tmp_path, p0="prefill", d0="decode", b0="both")


@pytest.fixture
def run(
    stack: Stack,
    write_policy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Return a function that runs ``disagg fleet`` and returns its code and what it printed."""
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    path = write_policy()

    def fleet(action: str, *args: str) -> tuple[int, str]:
        capsys.readouterr()
        url = f"http://127.0.0.1:{stack.port}"
        code = main(["fleet", action, str(path), *args, "--gateway", url])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return fleet


def test_list_shows_every_worker(run: Run, stack: Stack) -> None:
    code, text = run("list")
    assert code == 0
    assert f"d0 {stack.engines['d0'].url} vllm decode 0/1000 healthy\n" in text


def test_a_worker_is_added_drained_and_removed(run: Run, stack: Stack) -> None:
    with FakeEngine(secret=SECRET) as engine:
        given = ("d1", "--url", engine.url, "--role", "decode", "--capacity", "5")
        code, text = run("add", *given, "--label", "zone=a")
        assert (code, "worker d1 joined" in text) == (0, True)
        assert "gone when the gateway restarts" in text
        stack.wait_healthy("d1")
        worker = stack.gateway.fleet.states["d1"].worker
        assert (worker.capacity, worker.labels) == (5, {"zone": "a"})
        assert "draining" in run("drain", "d1")[1]
        assert "draining" not in run("drain", "d1", "--undo")[1]
        code, text = run("remove", "d1", "--wait")
        assert (code, "worker d1 has left" in text) == (0, True)
    assert "d1" not in stack.gateway.fleet.states


def test_a_role_is_moved(run: Run, stack: Stack) -> None:
    code, text = run("role", "b0", "prefill")
    assert (code, "worker b0 is prefill" in text) == (0, True)
    code, text = run("role", "b0", "decode")
    assert (code, "drains and becomes decode" in text) == (0, True)
    state = stack.gateway.fleet.states["b0"]
    eventually(lambda: str(state.worker.role) == "decode", "b0 writes answers")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("remove", "nobody"), "answered 404: there is no worker 'nobody'"),
        (("add", "d0", "--url", "http://h:1", "--role", "decode"), "is in the fleet already"),
        (("add", "d9", "--url", "nonsense", "--role", "decode"), "url: 'nonsense' is not of"),
        (("role", "d0", "both"), "only a worker declared both"),
    ],
)
def test_what_the_gateway_refuses_is_told(run: Run, args: tuple[str, ...], words: str) -> None:
    code, text = run(*args)
    assert code == 2
    assert words in text


def test_another_secret_changes_nothing(
    run: Run, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_SECRET", "another secret of 32 bytes......")
    code, text = run("remove", "d0")
    assert (code, "another secret is in use" in text) == (2, True)
    assert "d0" in stack.gateway.fleet.states


def test_a_gateway_that_is_not_there_is_named(run: Run, stack: Stack) -> None:
    stack.stop()
    code, text = run("list")
    assert (code, f"http://127.0.0.1:{stack.port} does not answer" in text) == (1, True)
