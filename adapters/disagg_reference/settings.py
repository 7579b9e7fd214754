"""What the server's command line says of the handoff, with the policy and the secret read."""

from __future__ import annotations

import os

from disagg_plugins.engine.settings import (
    WORKER_ENV,
    WorkerSettings,
    load_settings,
    nameless,
    worker_at,
)


def read_settings(policy_path: str, *, worker: str | None, port: int) -> WorkerSettings:
    """Read the policy for the server at ``port``.

    Args:
        policy_path: The file.
        worker: Its name; None: the environment's, else that of the policy's only worker there.
        port: Where it listens.

    Raises:
        ConfigError: The policy or its secret is wrong.
    """
    named = worker or os.environ.get(WORKER_ENV)
    return load_settings(policy_path, lambda p: named or worker_at(p, port) or nameless())
