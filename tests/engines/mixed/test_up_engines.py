"""``disagg up`` with workers of both engines in one policy file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from disagg_plugins.launch.local import healthy
from tests import parity
from tests.corpus import prompts
from tests.engines.client import complete
from tests.engines.probes import status, until
from tests.engines.sglang_bed import MODELS, POLICY, SGLANG_FLAGS, VLLM_FLAGS, introduced
from tests.engines.testbed import MODEL_NAME, Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

START_S = 300.0
END_S = 60.0


def test_one_command_starts_both_engines_and_ends_them(tmp_path: Path) -> None:
    servers = [
        Server("prefill", "prefill", (0,)),
        Server("decode", "decode", (1,), engine="sglang"),
    ]
    bed = Testbed(
        tmp_path,
        MODELS / "SmolLM2-135M-Instruct",
        servers,
        flags=VLLM_FLAGS,
        sglang_flags=SGLANG_FLAGS,
        policy=POLICY,
    )
    argv = [sys.executable, "-m", "disagg_plugins.cli.main", "up", str(bed.policy_path)]
    env = {**os.environ, "DISAGG_SECRET": "a secret for this test alone"}
    log = tmp_path / "up.log"
    with log.open("wb") as out:
        up = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=tmp_path)
    try:
        until(lambda: healthy(bed.gateway_url), f"the gateway: {log.read_text()}", START_S)
        until(lambda: all(map(ready, status(bed)["workers"])), "the workers", START_S)
        text = next(prompts([300], seed=400))
        complete(
            bed.gateway_url,
            text,
            max_tokens=8,
            model=MODEL_NAME,
            logprobs=None,
            request_id="up",
        )
        record = parity.record_of(bed, "up")
        assert (record["split"], record["handoff"]["form"]) == ("yes", "canonical")
        children = psutil.Process(up.pid).children(recursive=True)
        assert len(children) > 4
        up.send_signal(signal.SIGINT)
        assert up.wait(END_S) == 0
        until(lambda: not any(child.is_running() for child in children), "every process to end")
    finally:
        up.kill()
        up.wait()


def ready(worker: dict[str, object]) -> bool:
    return bool(worker["healthy"]) and introduced(worker)
