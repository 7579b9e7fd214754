"""Puts the candidate beside the baseline: from its policy to the front of two gateways."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.canary.front import Front
from disagg_plugins.canary.keeper import Keeper
from disagg_plugins.canary.lookout import Lookout
from disagg_plugins.canary.policy import ParityPolicy
from disagg_plugins.canary.store_opening import open_store
from disagg_plugins.gateway.app import parts_of
from disagg_plugins.gateway.server import Gateway
from disagg_plugins.telemetry.records import RecordFile

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from disagg_plugins.canary.candidate import Candidate
    from disagg_plugins.canary.keeper import View
    from disagg_plugins.canary.lookout import Seen
    from disagg_plugins.canary.policy import CanaryPolicy
    from disagg_plugins.plugins import PluginHost
    from disagg_plugins.policy import Policy

Join = Callable[[Gateway, "asyncio.TaskGroup"], Front]


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that is ready to be tried.

    Attributes:
        candidate: Its policy, and the plan.
        host: Its plugins.
        base_dir: The folder of the baseline's policy.
    """

    candidate: Candidate
    host: PluginHost
    base_dir: Path

    @property
    def policy(self) -> Policy:
        """The candidate's policy."""
        return self.candidate.loaded.policy

    @contextlib.contextmanager
    def opened(self, canary: CanaryPolicy, policy: Policy, secret: bytes) -> Iterator[Join]:
        """Yield what puts the candidate beside the baseline's gateway.

        Args:
            canary: The section of the baseline's policy.
            policy: The baseline's.
            secret: The fleet's secret.

        Raises:
            ConfigError: The records or the store's DSN cannot be had.
        """
        loaded, plan = self.candidate.loaded, self.candidate.plan
        named = loaded.policy.telemetry.records
        records = None
        if named is not None:
            records = RecordFile(loaded.base_dir / named.expanduser())
        try:
            tokenizer = loaded.policy.scheduler.tokenizer
            parts = parts_of(
                loaded.policy,
                self.host,
                secret,
                records,
                None if tokenizer is None else loaded.base_dir / tokenizer.expanduser(),
                loaded.base_dir,
            )
            store = open_store(canary.store, self.base_dir)
            name = f"{socket.gethostname()}:{policy.gateway.port}"
            keeper = Keeper(
                store,
                plan,
                canary.terms(plan),
                gateway=name,
                writer=secrets.token_hex(8),
                lease_s=canary.store.lease_s,
            )
            parity = canary.shadow.parity if canary.shadow is not None else ParityPolicy()

            def look(seen: Callable[[], Sequence[Seen]], looked: Callable[[View], None]) -> Lookout:
                return Lookout(
                    keeper,
                    store,
                    plan,
                    look_s=canary.look_s,
                    tie_gap=parity.tie_gap,
                    seen=seen,
                    looked=looked,
                )

            def join(baseline: Gateway, tasks: asyncio.TaskGroup) -> Front:
                return Front(
                    baseline,
                    Gateway(loaded.policy, parts, tasks),
                    canary,
                    secret,
                    authorization=self.candidate.authorization,
                    name=name,
                    plan=plan,
                    tasks=tasks,
                    look=look,
                )

            try:
                yield join
            finally:
                store.close()
        finally:
            if records is not None:
                records.close()
