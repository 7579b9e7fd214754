"""What changes a gateway's fleet while it runs: probes, members, roles, a watched file."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.health import Prober
from disagg_plugins.gateway.membership import Members
from disagg_plugins.gateway.rebalancing import Rebalancer
from disagg_plugins.gateway.watched_file import Found, WatchedFile

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.pool import Spawn, WorkerPool
    from disagg_plugins.gateway.rebalancing import Ask
    from disagg_plugins.policy import Policy, WorkerPolicy

log = logging.getLogger(__name__)


class FleetKeeper:
    """Keeps one fleet.

    Args:
        policy: The policy; its workers join at once.
        fleet: What is known of the workers.
        pools: Connections by worker name; kept up to date.
        spawn: Runs a coroutine in the gateway's task group.
        ask: Asks the plugins for a change of roles.
        watch: The watched file of workers, or None.
        joined: Told of each worker that joined.
        gone: Told the name of each worker that left.
    """

    def __init__(
        self,
        policy: Policy,
        fleet: FleetState,
        pools: dict[str, WorkerPool],
        spawn: Spawn,
        *,
        ask: Ask,
        watch: Path | None,
        joined: Callable[[WorkerPolicy], None],
        gone: Callable[[str], None],
    ) -> None:
        self.members = Members(policy, fleet, pools, spawn, joined, gone)
        switch_s = policy.scheduler.rebalance.switch_s
        self.prober = Prober(fleet, pools, policy.gateway, switch_s=switch_s)
        self.rebalancer = Rebalancer(policy, fleet, self.members, pools, self.prober, spawn, ask)
        self._watch = watch
        self._watch_s = policy.fleet.watch_s
        self._watched: WatchedFile | None = None

    def start(self) -> None:
        """Begin to follow the watched file, and to have everyone probed once the prober runs."""
        self.members.probe_with(self.prober)
        if self._watch is not None:
            loop = asyncio.get_running_loop()
            self._watched = WatchedFile(self._watch, self._watch_s, loop, self._follow)
            self._watched.start()

    def close(self) -> None:
        """Follow the file no more."""
        if self._watched is not None:
            self._watched.close()

    def _follow(self, found: Found) -> None:
        """Make the fleet what the watched file says, or tell why it stays as it was."""
        try:
            if isinstance(found, ConfigError):
                raise found
            self.members.follow(found, time.monotonic())
        except ConfigError as exc:
            log.error("the file of workers is wrong, the fleet stays as it was: %s", exc)
            self.members.file_problem = str(exc)
        else:
            self.members.file_problem = ""
