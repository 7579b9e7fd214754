"""What the environment of an SGLang server says, with the policy and the secret read."""

from __future__ import annotations

import os
from collections.abc import Mapping

from disagg_plugins.engine.settings import (
    MAX_NAME_CHARS,
    WorkerSettings,
    load_settings,
    nameless,
    worker_at,
)
from disagg_plugins.errors import ConfigError
from disagg_sglang.launcher import POLICY_ENV, WORKER_ENV


def read_settings(port: int, environ: Mapping[str, str] | None = None) -> WorkerSettings:
    """Read policy and secret; the worker is the one named, or the only one on ``port``.

    Raises:
        ConfigError: No policy is named, or it or its secret is wrong.
    """
    env = os.environ if environ is None else environ
    path = env.get(POLICY_ENV)
    if not path:
        raise ConfigError(
            "the transfer backend disagg needs a policy file",
            key=POLICY_ENV,
            fix=f"set {POLICY_ENV}=/path/to/disagg.yaml in the environment of the SGLang server",
        )
    given = env.get(WORKER_ENV, "")[:MAX_NAME_CHARS]
    return load_settings(path, lambda policy: given or worker_at(policy, port) or nameless())
