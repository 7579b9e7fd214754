from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Disagg = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def disagg() -> Disagg:
    """Return a function that runs ``disagg`` with arguments in a process of its own."""

    def run(
        *args: object, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "disagg_plugins.cli.main", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=50,
            env={**os.environ, **(env or {})},
            **options,
        )

    return run


@pytest.fixture
def write_policy(tmp_path: Path, free_port: Callable[[], int]) -> Callable[..., Path]:
    """Return a function that writes a policy of one prefill and one decode worker."""

    def write(
        urls: tuple[str, ...] = (), launch: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        workers: list[dict[str, Any]] = [
            {"name": name, "role": role, "url": url, **({"launch": launch} if launch else {})}
            for (name, role), url in zip(
                (("p0", "prefill"), ("d0", "decode")),
                urls or [f"http://127.0.0.1:{free_port()}" for _ in range(2)],
                strict=True,
            )
        ]
        policy = {
            "model": "fake-model",
            "fleet": {"workers": workers},
            "gateway": {"port": free_port(), "probe_s": 0.2, "drain_s": 2},
            **more,
        }
        path = tmp_path / "disagg.yaml"
        path.write_text(yaml.safe_dump(policy))
        return path

    return write
