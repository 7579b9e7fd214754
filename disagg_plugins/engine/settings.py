"""What an engine was told: the policy, the fleet's secret, and which worker it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from disagg_plugins.credentials import read_secret
from disagg_plugins.errors import AuthenticationError
from disagg_plugins.handoff.tickets import Ticket, verify
from disagg_plugins.policy import Policy, load_policy
from disagg_plugins.telemetry.reports import Reporter

MAX_NAME_CHARS = 64
WORKER_ENV = "DISAGG_WORKER"
"""Names the worker where nothing else does."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What one engine was told.

    Attributes:
        policy: The policy file's content.
        secret: The fleet's secret; never printed.
        worker: The worker's name in reports.
    """

    policy: Policy
    secret: bytes = field(repr=False)
    worker: str

    def verify(self, text: str, step: Literal["prefill", "decode"]) -> Ticket:
        """Return the ticket if it is good for this worker and ``step``.

        Raises:
            AuthenticationError: False, expired, or for another worker.
        """
        ticket = verify(self.secret, text, time.time())
        meant = ticket.prefill if step == "prefill" else ticket.decode
        if meant != self.worker and self.worker in {w.name for w in self.policy.fleet.workers}:
            raise AuthenticationError(
                f"the ticket asks worker {meant!r} for {step}, this is {self.worker!r}: compare "
                "the workers' names and urls in the policy with where they listen"
            )
        return ticket

    def make_reporter(self) -> Reporter:
        """Return the channel to the gateway that the policy names."""
        gateway = self.policy.gateway
        host = gateway.advertise_host or gateway.host
        if ":" in host:
            host = f"[{host}]"
        return Reporter(f"http://{host}:{gateway.port}", self.secret, self.worker)


def load_settings(policy_path: str, name: Callable[[Policy], str]) -> WorkerSettings:
    """Read a policy file and its secret.

    Args:
        policy_path: The file.
        name: Says which worker of the policy this engine is.

    Raises:
        ConfigError: The policy or its secret is wrong.
    """
    policy = load_policy(policy_path)
    secret = read_secret(policy.secret, Path(policy_path).resolve().parent)
    return WorkerSettings(policy, secret, name(policy))


def worker_at(policy: Policy, port: int) -> str | None:
    """Return the only worker of the policy with that port, or None."""
    names = [w.name for w in policy.fleet.workers if urlsplit(w.url).port == port]
    return names[0] if len(names) == 1 else None


def nameless() -> str:
    """Return host and process id, which the gateway shows as an unknown worker."""
    return f"{os.uname().nodename}-{os.getpid()}"[:MAX_NAME_CHARS]
