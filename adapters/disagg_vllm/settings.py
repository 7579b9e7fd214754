"""What ``kv_connector_extra_config`` says, with the policy and the secret read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from disagg_plugins.credentials import read_secret
from disagg_plugins.errors import AuthenticationError, ConfigError
from disagg_plugins.handoff.tickets import verify
from disagg_plugins.policy import Policy, load_policy
from disagg_plugins.telemetry.reports import Reporter
from disagg_plugins.types import HandoffId
from disagg_vllm.names import worker_name

KEYS = ("policy", "worker", "load_failure")


@dataclass(frozen=True, slots=True)
class Settings:
    """What one engine was told.

    Attributes:
        policy: The policy file's content.
        secret: The fleet's secret; never printed.
        worker: The worker's name in reports; see ``names.worker_name``.
        load_failure: ``recompute`` (default) or ``fail``, vLLM's own default.
    """

    policy: Policy
    secret: bytes = field(repr=False)
    worker: str
    load_failure: Literal["recompute", "fail"]

    def verify(self, text: str, step: Literal["prefill", "decode"]) -> HandoffId:
        """Return the handoff of a ticket that is good for this worker and ``step``.

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
        return HandoffId(ticket.handoff_id)

    def make_reporter(self) -> Reporter:
        """Return the channel to the gateway that the policy names."""
        gateway = self.policy.gateway
        host = gateway.advertise_host or gateway.host
        if ":" in host:
            host = f"[{host}]"
        return Reporter(f"http://{host}:{gateway.port}", self.secret, self.worker)


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
    policy = load_policy(path)
    secret = read_secret(policy.secret, Path(path).resolve().parent)
    worker = worker_name(policy, extra_config.get("worker"))
    return Settings(policy, secret, worker, load_failure)
