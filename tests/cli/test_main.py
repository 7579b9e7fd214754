from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from disagg_plugins import __version__, hookimpl
from disagg_plugins.cli import main as cli
from disagg_plugins.errors import ConfigError, TransportError
from disagg_plugins.plugins import PluginHost

if TYPE_CHECKING:
    import argparse


class Broken:
    """A subcommand that does whatever a test wants."""

    name = "broken"
    help = "do what the test wants"

    def __init__(self, act: Callable[[], int]) -> None:
        self.act = act

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, default=1)

    def run(self, args: argparse.Namespace) -> int:
        return self.act()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs ``disagg broken`` with a given deed."""
    load = PluginHost.load

    def run(act: Callable[[], int], *args: str) -> int:
        class Plugin:
            @hookimpl
            def disagg_register_commands(self) -> list[Broken]:
                return [Broken(act)]

        monkeypatch.setattr(
            PluginHost, "load", lambda: load(entry_points=False, extra=[("broken", Plugin())])
        )
        return cli.main([*args, "broken"])

    return run


def raising(error: BaseException) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


def test_exit_code_of_the_command_is_passed_on(run: Callable[..., int]) -> None:
    assert run(lambda: 5) == 5


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ConfigError("is wrong", file="disagg.yaml", line=3, key="fleet", fix="mend it"),
            2,
            "disagg: error: disagg.yaml:3: fleet: is wrong (mend it)\n",
        ),
        (TransportError("tcp", "reset"), 1, "disagg: error: transport tcp: reset\n"),
        (
            RuntimeError("oops"),
            70,
            "disagg: internal error: RuntimeError: oops (--debug shows where)\n",
        ),
        (
            ExceptionGroup("tasks", [ExceptionGroup("inner", [ConfigError("is wrong")])]),
            2,
            "disagg: error: is wrong\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_error_is_one_line_and_an_exit_code(
    run: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    assert run(raising(error)) == code
    assert capfd.readouterr().err == line


def test_debug_shows_the_traceback(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(TransportError("tcp", "reset")), "--debug") == 1
    assert "Traceback" in capfd.readouterr().err


def test_unknown_command_exits_with_two_and_names_those_there_are(disagg: Any) -> None:
    done = disagg("frobnicate")
    assert done.returncode == 2
    assert "choose from" in done.stderr
    assert "doctor" in done.stderr


def test_built_in_commands_come_through_the_hook(disagg: Any) -> None:
    done = disagg("--help")
    assert done.returncode == 0
    for name in ("up", "serve", "policy", "doctor", "plugins", "bench", "version"):
        assert f"    {name} " in done.stdout


def test_version_names_package_protocol_and_hooks(disagg: Any) -> None:
    assert disagg("--version").stdout == f"disagg-plugins {__version__}\n"
    said = disagg("version").stdout
    assert said.startswith(f"disagg-plugins {__version__}, handoff protocol ")


def test_reader_that_goes_away_is_no_traceback(disagg: Any) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "disagg_plugins.cli.main", "policy", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
