"""What the connector's part of the engine's flag may say, and for whom a ticket is good."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from disagg_plugins.errors import AuthenticationError, ConfigError
from disagg_plugins.handoff.tickets import mint, new_handoff_id
from disagg_vllm.settings import Settings, read_settings

SECRET = "0123456789abcdef0123456789abcdef"
POLICY = """
fleet:
  workers:
    - {name: p0, url: "http://127.0.0.1:8101", role: prefill}
    - {name: d0, url: "http://127.0.0.1:8102", role: decode}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DISAGG_SECRET", SECRET)
    monkeypatch.delenv("DISAGG_WORKER", raising=False)
    file = tmp_path / "disagg.yaml"
    file.write_text(POLICY)
    return str(file)


def settings(path: str, worker: str) -> Settings:
    return read_settings({"policy": path, "worker": worker})


def ticket() -> str:
    return mint(
        SECRET.encode(),
        handoff_id=new_handoff_id(),
        prefill="p0",
        decode="d0",
        now_s=time.time(),
        valid_s=60,
    )


def test_a_ticket_is_good_for_the_workers_it_names(path: str) -> None:
    text = ticket()
    assert settings(path, "p0").verify(text, "prefill") == settings(path, "d0").verify(
        text, "decode"
    )


@pytest.mark.parametrize(("worker", "step"), [("d0", "prefill"), ("p0", "decode")])
def test_a_ticket_for_another_worker_is_refused(path: str, worker: str, step: Any) -> None:
    with pytest.raises(AuthenticationError, match=worker):
        settings(path, worker).verify(ticket(), step)


def test_a_worker_that_the_policy_does_not_name_takes_every_ticket(path: str) -> None:
    assert settings(path, "elsewhere").verify(ticket(), "prefill")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no policy file"),
        ({"policy": ""}, "no policy file"),
        ({"policy": "x", "polcy": "y"}, "polcy"),
        ({"policy": "x", "load_failure": "ignore"}, "ignore"),
        ({"policy": "/no/such/file.yaml"}, "file.yaml"),
    ],
)
def test_a_wrong_flag_is_a_clear_error(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_settings(config)


def test_the_secret_is_not_shown(path: str) -> None:
    assert SECRET not in repr(settings(path, "p0"))


def test_reports_go_to_the_advertised_address(path: str) -> None:
    Path(path).write_text(POLICY + 'gateway: {host: "::", advertise_host: "::1"}\n')
    reporter = settings(path, "p0").make_reporter()
    reporter.close()
