"""What subcommands share: the gateway that is meant, and what a policy names in vain."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins.cli.common import add_gateway, gateway_url
from disagg_plugins.cli.main import main


def asked(*given: object) -> str:
    """Return the gateway that a command with these options asks."""
    parser = argparse.ArgumentParser()
    add_gateway(parser)
    return gateway_url(parser.parse_args([str(each) for each in given]))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where no policy lies."""
    monkeypatch.delenv("DISAGG_POLICY", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def test_a_gateway_is_asked_at_its_address_or_at_the_port_of_a_policy_without_one() -> None:
    assert asked() == "http://127.0.0.1:8000"
    assert asked("--gateway", "http://h:1") == "http://h:1"


def test_without_an_address_the_gateway_of_the_policy_that_is_found_is_asked(
    write_policy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy(gateway={"port": 8100})
    monkeypatch.chdir(path.parent)
    assert asked() == "http://127.0.0.1:8100"
    assert asked("--gateway", "http://h:1") == "http://h:1"
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text().replace("8100", "8200"))
    monkeypatch.setenv("DISAGG_POLICY", str(other))
    assert asked() == "http://127.0.0.1:8200"
    assert asked("--policy", path) == "http://127.0.0.1:8100"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8100"),
        ("10.0.0.7", "http://10.0.0.7:8100"),
        ("::1", "http://[::1]:8100"),
        # every address of this machine: its own is one of them
        ("0.0.0.0", "http://127.0.0.1:8100"),
        ("::", "http://[::1]:8100"),
    ],
)
def test_a_policy_tells_where_its_gateway_listens(
    write_policy: Callable[..., Path], host: str, url: str
) -> None:
    assert asked("--policy", write_policy(gateway={"host": host, "port": 8100})) == url


def test_a_policy_and_an_address_at_once_are_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        asked("--policy", "disagg.yaml", "--gateway", "http://h:1")


@pytest.mark.parametrize("command", [["top", "--once"], ["explain", "r1"]])
def test_commands_ask_the_gateway_of_the_policy(
    write_policy: Callable[..., Path],
    free_port: Callable[[], int],
    command: list[str],
    capsys: Any,
) -> None:
    port = free_port()
    assert main([*command, "--policy", str(write_policy(gateway={"port": port}))]) == 1
    assert f"http://127.0.0.1:{port} does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["top", "--once"], ["explain", "r1"]])
def test_a_policy_that_is_not_there_is_an_error_in_one_line(
    tmp_path: Path, command: list[str], capsys: Any
) -> None:
    assert main([*command, "--policy", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
