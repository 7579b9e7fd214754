"""What the environment says: ``kv_connector_config`` takes no key of ours.

- ``DISAGG_POLICY``: the policy file; needed.
- ``DISAGG_WORKER``: this worker's name in it; else host and process id.
- ``DISAGG_TRTLLM_LOADS``: ``sync`` (default) or ``async``.

MPI hands the environment of ``trtllm-serve`` on to its ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from disagg_plugins.engine.settings import WORKER_ENV, WorkerSettings, load_settings, nameless
from disagg_plugins.errors import ConfigError

POLICY_ENV = "DISAGG_POLICY"
LOADS_ENV = "DISAGG_TRTLLM_LOADS"


@dataclass(frozen=True, slots=True)
class Settings(WorkerSettings):
    """What one TensorRT-LLM was told.

    Attributes:
        asynchronous: Whether requests are parked while their KV is copied in.
    """

    asynchronous: bool = False


def read_settings(env: Mapping[str, str] | None = None) -> Settings:
    """Read the environment.

    Raises:
        ConfigError: A variable is missing or wrong, or the policy or its secret is.
    """
    env = os.environ if env is None else env
    path = env.get(POLICY_ENV)
    if not path:
        raise ConfigError(
            "no policy file is named", key=POLICY_ENV, fix=f"export {POLICY_ENV}=disagg.yaml"
        )
    loads = env.get(LOADS_ENV, "sync")
    if loads not in ("sync", "async"):
        raise ConfigError(f"{loads!r} is neither sync nor async", key=LOADS_ENV)
    told = load_settings(path, lambda policy: env.get(WORKER_ENV) or nameless())
    return Settings(told.policy, told.secret, told.worker, loads == "async")
