"""How ``disagg up`` starts an SGLang server. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
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
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy

SERVER_MODULE = "sglang.launch_server"
"""SGLang 0.5.23 recommends ``sglang serve``, a script; a module needs the interpreter alone."""

TRANSFER_BACKEND = "disagg"
"""The name under which this project's plugin registers its transfer backend in SGLang."""

POLICY_ENV = "DISAGG_POLICY"
WORKER_ENV = "DISAGG_WORKER"
"""How the half inside the engine finds its settings: SGLang hands a backend no options of its own.
Every process of a server inherits them."""

OURS = {
    "--model-path": "launch.model",
    "--model": "launch.model",
    "--served-model-name": "model",
    "--host": "the worker's url",
    "--port": "the worker's url",
    "--disaggregation-mode": "role",
    "--disaggregation-transfer-backend": "handoff",
}
"""Flags that follow from the policy, and the key they come from."""

TENSOR_PARALLEL = ("--tp-size", "--tensor-parallel-size", "--tp")
PIPELINE_PARALLEL = ("--pp-size", "--pipeline-parallel-size", "--pp")
DATA_PARALLEL = ("--dp-size", "--data-parallel-size", "--dp")
DP_ATTENTION = "--enable-dp-attention"
"""Names of SGLang 0.5.23; its parser takes ``--tp`` and the like as abbreviations. With
data-parallel attention the replicas are parts of the tensor-parallel group, not more processes."""


def num_ranks(args: Sequence[str]) -> int:
    """Return how many ranks the flags ask for: the replicas times what each consists of."""
    ranks = whole_number(args, TENSOR_PARALLEL) * whole_number(args, PIPELINE_PARALLEL)
    return ranks if DP_ATTENTION in args else ranks * whole_number(args, DATA_PARALLEL)


ROLE_SWITCH = "--enable-pd-role-switch"


def role_flags(role: Role, port: str, *, role_switch: bool = False) -> tuple[str, ...]:
    """Return the flags that make a server a prefill or a decode worker; none for both.

    A server whose role can be switched begins as a decode worker.

    The bootstrap port is the worker's own HTTP port. SGLang binds it only in a backend's bootstrap
    server, and this project's listens nowhere; requests and registrations merely carry the number,
    as half of a prefill worker's address. So it has to differ between workers of one machine, which
    the default (8998) does not.
    """
    if role_switch:
        return (ROLE_SWITCH, *role_flags(Role.DECODE, port))
    if role is Role.BOTH:
        return ()
    return (
        "--disaggregation-mode",
        role.value,
        "--disaggregation-transfer-backend",
        TRANSFER_BACKEND,
        "--disaggregation-bootstrap-port",
        port,
    )


class SglangLauncher:
    """Starts SGLang's server with this project's transfer backend, or whole for the role both."""

    engine = "sglang"

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return the server's command line; the secret travels in the inherited environment."""
        launch = worker.launch
        if launch is None:
            raise ConfigError(f"worker {worker.name} has no launch section")
        refuse_flags(launch.args, OURS, policy_path, worker=worker.name)
        base = policy_path.parent
        parts = urlsplit(worker.url)
        port = str(parts.port)
        argv = [
            find_python(launch, base, worker=worker.name),
            "-m",
            SERVER_MODULE,
            "--model-path",
            find_model(launch.model, base),
            "--served-model-name",
            policy.model or launch.model,
            "--host",
            parts.hostname or "127.0.0.1",
            "--port",
            port,
            *role_flags(worker.role, port, role_switch=worker.role_switch),
            *launch.args,
        ]
        env = {POLICY_ENV: str(policy_path.absolute()), WORKER_ENV: worker.name}
        if launch.cpus:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = threads_bind(launch.cpus, num_ranks(launch.args))
        return LaunchCommand(tuple(argv), {**env, **launch.env})
