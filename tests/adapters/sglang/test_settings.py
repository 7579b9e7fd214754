"""Which worker an SGLang server is, and for whom a ticket is good."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins.errors import AuthenticationError, ConfigError
from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_sglang.settings import read_settings

SECRET = "0123456789abcdef0123456789abcdef"
POLICY = """
fleet:
  workers:
    - {name: p0, url: "http://127.0.0.1:8101", engine: sglang, role: prefill}
    - {name: d0, url: "http://127.0.0.1:8102", engine: sglang, role: decode}
    - {name: d1, url: "http://10.0.0.1:8103", engine: sglang, role: decode}
    - {name: d2, url: "http://10.0.0.2:8103", engine: sglang, role: decode}
"""


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("DISAGG_SECRET", SECRET)
    file = tmp_path / "disagg.yaml"
    file.write_text(POLICY)
    return {"DISAGG_POLICY": str(file)}


def ticket() -> str:
    return mint(
        SECRET.encode(),
        handoff_id=new_handoff_id(),
        prefill="p0",
        decode="d0",
        now_s=time.time(),
        valid_s=60,
    )


def test_a_worker_is_the_one_that_is_named(env: dict[str, str]) -> None:
    assert read_settings(8101, {**env, "DISAGG_WORKER": "d0"}).worker == "d0"


def test_a_worker_without_a_name_is_the_only_one_on_its_port(env: dict[str, str]) -> None:
    assert read_settings(8101, env).worker == "p0"
    assert read_settings(8102, {**env, "DISAGG_WORKER": ""}).worker == "d0"


@pytest.mark.parametrize("port", [8103, 9999])
def test_a_worker_that_nothing_tells_apart_gets_a_name_of_its_own(
    env: dict[str, str], port: int
) -> None:
    assert read_settings(port, env).worker not in ("p0", "d0", "d1", "d2")


def test_a_long_name_is_cut(env: dict[str, str]) -> None:
    assert read_settings(8101, {**env, "DISAGG_WORKER": "x" * 999}).worker == "x" * 64


def test_the_environment_of_the_process_is_read(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISAGG_POLICY", env["DISAGG_POLICY"])
    monkeypatch.setenv("DISAGG_WORKER", "d1")
    assert read_settings(8101).worker == "d1"


@pytest.mark.parametrize("given", [{}, {"DISAGG_POLICY": ""}])
def test_a_missing_policy_is_a_clear_error(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="set DISAGG_POLICY=") as caught:
        read_settings(8101, given)
    assert caught.value.key == "DISAGG_POLICY"


def test_a_policy_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"file\.yaml"):
        read_settings(8101, {"DISAGG_POLICY": "/no/such/file.yaml"})


def test_a_missing_secret_is_an_error(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_SECRET")
    with pytest.raises(ConfigError, match="DISAGG_SECRET"):
        read_settings(8101, env)


def test_the_secret_is_not_shown(env: dict[str, str]) -> None:
    assert SECRET not in repr(read_settings(8101, env))


def test_a_ticket_is_good_for_the_workers_it_names(env: dict[str, str]) -> None:
    text = ticket()
    prefill, decode = read_settings(8101, env), read_settings(8102, env)
    assert prefill.verify(text, "prefill") == decode.verify(text, "decode")


@pytest.mark.parametrize(("port", "step"), [(8102, "prefill"), (8101, "decode")])
def test_a_ticket_for_another_worker_is_refused(env: dict[str, str], port: int, step: Any) -> None:
    settings = read_settings(port, env)
    with pytest.raises(AuthenticationError, match=settings.worker):
        settings.verify(ticket(), step)
