"""How ``disagg up`` starts ``trtllm-serve``. Imports no engine.

Written against the published interface, not run on TensorRT-LLM here. What the engine itself has to
be told (``kv_connector_config``, ``cache_transceiver_config``) stands in a file of the operator's,
named in ``launch.args``: ``--extra_llm_api_options FILE``, ``--config FILE`` in newer releases.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.engine.settings import WORKER_ENV
from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.interfaces import LaunchCommand
from disagg_plugins.launch.programs import find_model, find_python, refuse_flags
from disagg_trtllm.settings import POLICY_ENV

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy

PROGRAM = "trtllm-serve"
"""Beside the interpreter of the environment that has the engine."""

OURS = {"--host": "the worker's url", "--port": "the worker's url"}
"""Flags that follow from the policy, and the key they come from."""

OPTIONS = ("--extra_llm_api_options", "--config")


class TrtllmLauncher:
    """Starts ``trtllm-serve`` for one of the two engines.

    Args:
        engine: ``trtllm`` or ``trtllm-native``.
    """

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the server's command line; the secret travels in the inherited environment."""
        launch = worker.launch
        if launch is None:
            raise ConfigError(f"worker {worker.name} has no launch section")
        refuse_flags(launch.args, OURS, policy_path, worker=worker.name)
        if not any(arg.partition("=")[0] in OPTIONS for arg in launch.args):
            raise ConfigError(
                f"worker {worker.name} names no file of engine options",
                file=str(policy_path),
                key=f"fleet.workers.{worker.name}.launch.args",
                fix=f"write [{OPTIONS[0]}, FILE]; see migration_guides/tensorrt_llm.md",
            )
        base, parts = policy_path.parent, urlsplit(worker.url)
        python = find_python(launch, base, worker=worker.name)
        argv = (
            str(Path(python).with_name(PROGRAM)),
            find_model(launch.model, base),
            "--host",
            parts.hostname or "127.0.0.1",
            "--port",
            str(parts.port),
            *launch.args,
        )
        env = {POLICY_ENV: str(policy_path), WORKER_ENV: worker.name}
        return LaunchCommand(argv, {**env, **launch.env})
