"""What ``kv_connector_extra_config`` says, with the policy and the secret read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from disagg_plugins.engine.settings import WorkerSettings, load_settings
from disagg_plugins.errors import ConfigError
from disagg_vllm.names import worker_name

KEYS = ("policy", "worker", "load_failure")


@dataclass(frozen=True, slots=True)
class Settings(WorkerSettings):
    """What one vLLM was told.

    Attributes:
        load_failure: ``recompute`` (default) or ``fail``, vLLM's own default.
    """

    load_failure: Literal["recompute", "fail"] = "recompute"


def read_settings(extra_config: Mapping[str, Any]) -> Settings:
    """Read the connector's part of ``--kv-transfer-config``.

    Raises:
        ConfigError: No policy is named, a key is unknown, or the policy or its secret is wrong.
    """
    unknown = sorted(set(extra_config) - set(KEYS))
    if unknown:
        raise ConfigError(
            f"unknown keys {unknown}", key="kv_connector_extra_config", fix=f"allowed: {KEYS}"
        )
    path = extra_config.get("policy")
    if not isinstance(path, str) or not path:
        raise ConfigError(
            "no policy file is named",
            key="kv_connector_extra_config.policy",
            fix='write "kv_connector_extra_config":{"policy":"disagg.yaml"}',
        )
    load_failure = extra_config.get("load_failure", "recompute")
    if load_failure not in ("recompute", "fail"):
        raise ConfigError(
            f"{load_failure!r} is neither recompute nor fail",
            key="kv_connector_extra_config.load_failure",
        )
    told = load_settings(path, lambda policy: worker_name(policy, extra_config.get("worker")))
    return Settings(told.policy, told.secret, told.worker, load_failure)
