"""What the command refuses to start with, and that it serves until it is told to stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest

from disagg_reference.serve import cache_folder, main

START_S = 60.0


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--fault", "meteor"], "'meteor' is no fault"),
        (["--fault", "corrupt-blocks:99,0"], "corrupt-blocks:99,0: the model has 2 layers"),
        (["--fault", "corrupt-blocks:0,99"], "KV heads"),
        (["--tensor-parallel-size", "3"], "cannot be shared by 3 ranks"),
        (["--policy", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_mistake_ends_it_with_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], more: list[str], problem: str
) -> None:
    assert main(["--model", str(model), "--port", "1", *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("disagg-reference: ")
    assert problem in said


def test_an_environment_without_torch_ends_it_with_the_way_to_add_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["--model", str(model), "--port", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"disagg-reference: torch is not installed for {sys.executable}")
    assert "pip install 'disagg-plugins[reference]'" in said


def test_a_port_in_use_ends_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["--model", str(model), "--port", str(other.getsockname()[1])]) == 1
    assert "disagg-reference: " in capsys.readouterr().err


def test_what_can_be_made_again_is_kept_where_the_user_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "disagg-plugins"


def test_it_serves_until_it_is_told_to_stop(model: Path, free_port) -> None:
    port = free_port()
    argv = [sys.executable, "-m", "disagg_reference.serve", "--threads", "1"]
    argv += ["--model", str(model), "--port", str(port), "--served-model-name", "demo"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert any("listens at" in line for line in server.stderr)  # ends with the process
            connection = HTTPConnection("127.0.0.1", port, timeout=START_S)
            body = {"model": "demo", "prompt": "Hi", "max_tokens": 2, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body))
            assert json.loads(connection.getresponse().read())["usage"]["prompt_tokens"] == 2
            connection.close()
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=START_S)
        finally:
            server.kill()
    assert server.returncode == 0
