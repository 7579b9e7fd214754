"""Which worker of the policy an engine is."""

from __future__ import annotations

import pytest

from disagg_plugins.policy import Policy
from disagg_vllm.names import port_of, worker_name

SERVER = ["python", "-m", "vllm.entrypoints.openai.api_server"]


def policy(*ports: int) -> Policy:
    workers = [
        {"name": f"w{i}", "url": f"http://host{i}:{port}", "role": "both"}
        for i, port in enumerate(ports)
    ]
    return Policy.model_validate({"fleet": {"workers": workers}})


@pytest.mark.parametrize(
    ("argv", "port"),
    [
        ([*SERVER, "--port", "8101"], 8101),
        ([*SERVER, "--port=8102", "--model", "m"], 8102),
        (["vllm", "serve", "m"], 8000),
        (["vllm", "serve", "m", "--port"], None),
        (["bash", "-c", "x --port 8101"], None),
    ],
)
def test_the_port_is_read_from_a_servers_command_line_only(
    argv: list[str], port: int | None
) -> None:
    assert port_of(argv) == port


def test_the_worker_whose_port_the_server_has_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_WORKER", raising=False)
    lines = [["VLLM::EngineCore"], [*SERVER, "--port", "8102"]]
    assert worker_name(policy(8101, 8102), None, lines) == "w1"


def test_an_ambiguous_port_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_WORKER", raising=False)
    name = worker_name(policy(8000, 8000), None, [["vllm", "serve", "m"]])
    assert name not in ("w0", "w1")


def test_the_given_name_and_then_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_WORKER", "from-env")
    lines = [["vllm", "serve", "m"]]
    assert worker_name(policy(8000), "given", lines) == "given"
    assert worker_name(policy(8000), None, lines) == "from-env"
