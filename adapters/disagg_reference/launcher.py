"""How ``disagg up`` starts a server of the reference engine. Imports no engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.programs import find_model, find_python, refuse_flags

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy

SERVER_MODULE = "disagg_reference.serve"

OURS = {
    "--model": "launch.model",
    "--served-model-name": "model",
    "--host": "the worker's url",
    "--port": "the worker's url",
    "--policy": "handoff",
    "--worker": "the worker's name",
}
"""Flags that follow from the policy, and the key they come from."""

TINY = "tiny"
"""As ``launch.model``: the generated model, which the server makes itself."""


class ReferenceLauncher:
    """Starts the reference engine's server with its handoffs on."""

    engine = "reference"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the server's command line; the secret travels in the inherited environment."""
        launch = worker.launch
        if launch is None:
            raise ConfigError(f"worker {worker.name} has no launch section")
        refuse_flags(launch.args, OURS, policy_path, worker=worker.name)
        base, parts = policy_path.parent, urlsplit(worker.url)
        argv = (
            find_python(launch, base, worker=worker.name),
            "-m",
            SERVER_MODULE,
            "--model",
            launch.model if launch.model == TINY else find_model(launch.model, base),
            "--served-model-name",
            policy.model or launch.model,
            "--host",
            parts.hostname or "127.0.0.1",
            "--port",
            str(parts.port),
            "--policy",
            str(policy_path),
            "--worker",
            worker.name,
            *launch.args,
        )
        env: dict[str, str] = {}
        if launch.cpus:
            env["OMP_NUM_THREADS"] = str(len(launch.cpus))
        return LaunchCommand(argv, {**env, **launch.env})
