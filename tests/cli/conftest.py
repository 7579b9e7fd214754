from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from disagg_plugins.cli.main import main

Disagg = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def disagg() -> Disagg:
    """Return a function that runs ``disagg`` with arguments.

    It runs in this process, which saves a second; in one of its own where a test asks for
    ``process=True`` or gives options of ``subprocess.run``.
    """

    def run(
        *args: object, env: dict[str, str] | None = None, process: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        words = [str(arg) for arg in args]
        if not process and not options:
            return in_this_process(words, env or {})
        return subprocess.run(
            [sys.executable, "-m", "disagg_plugins.cli.main", *words],
            capture_output=True,
            text=True,
            timeout=50,
            env={**os.environ, **(env or {})},
            **options,
        )

    return run


def in_this_process(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command, and leave logging and environment as they were."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            code = main(words)
        except SystemExit as exc:  # argparse
            code = exc.code if isinstance(exc.code, int) else 1
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


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
