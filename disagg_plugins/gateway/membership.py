"""Who belongs to the fleet while the gateway runs: workers join, drain, leave and change.

A worker that leaves drains first: it is given nothing new, and once its requests have ended, or
``gateway.drain_s`` has passed, its connections are closed and it is forgotten. Requests that are
still there then fail as with a failed worker: they are retried elsewhere where that is possible.
One coarse clock drives it (``sweep``), so no task waits for a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.pool import WorkerPool
from disagg_plugins.policy_advice import is_loopback
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.health import Prober
    from disagg_plugins.gateway.pool import Spawn
    from disagg_plugins.gateway.worker_state import Work
    from disagg_plugins.policy import Policy, WorkerPolicy
    from disagg_plugins.types import Worker

log = logging.getLogger(__name__)

MAX_WORKERS = 16_384
"""Of one gateway, however they joined: each costs a task of probes and a few KiB."""

NOT_LEFT = -1
"""What work is marked with that no worker has: it was given to one that had left."""


@dataclass(slots=True)
class _Member:
    """One worker that belongs to the fleet.

    Attributes:
        given: As it was described.
        by: Who described it: ``policy``, ``file`` or ``operator``.
        leaves_s: When its drain ends at the latest; None while it stays.
        then: What joins under its name once it has left.
    """

    given: WorkerPolicy
    by: str
    leaves_s: float | None = None
    then: WorkerPolicy | None = None


class Members:
    """The workers of a gateway, their connections and their probes.

    Args:
        policy: The policy; its workers join at once.
        fleet: Is told who joins, drains and leaves.
        pools: Connections by worker name; kept up to date here.
        spawn: Runs a coroutine in the gateway's task group.
        joined: Told of each worker that joined.
        gone: Told the name of each worker that left.
    """

    def __init__(
        self,
        policy: Policy,
        fleet: FleetState,
        pools: dict[str, WorkerPool],
        spawn: Spawn,
        joined: Callable[[WorkerPolicy], None],
        gone: Callable[[str], None],
    ) -> None:
        self._policy = policy
        self._fleet = fleet
        self._pools = pools
        self._spawn = spawn
        self._joined = joined
        self._gone = gone
        self._prober: Prober | None = None
        self._members: dict[str, _Member] = {}
        self._urls: dict[str, str] = {}
        self._leaving: set[str] = set()
        self.file_problem = ""  # why the watched file is not followed at present
        for worker in policy.fleet.workers:
            self.add(worker, by="policy")

    def probe_with(self, prober: Prober) -> None:
        """Have everyone who belongs to the fleet probed."""
        self._prober = prober
        for name in self._members:
            prober.watch(name)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def of(self, name: str) -> tuple[WorkerPolicy, str, bool]:
        """Return how a worker was described, by whom, and whether it leaves.

        Raises:
            KeyError: There is no such worker.
        """
        member = self._members[name]
        return member.given, member.by, member.leaves_s is not None

    # Joining

    def add(self, given: WorkerPolicy, *, by: str) -> None:
        """A worker joins.

        Raises:
            ConfigError: It cannot; tells the key.
        """
        self._check(given)
        worker = given.worker()
        self._fleet.add(worker)
        connect_s = self._policy.gateway.connect_s
        self._pools[given.name] = WorkerPool(worker, self._spawn, connect_s=connect_s)
        self._members[given.name] = _Member(given, by)
        self._urls[given.url] = given.name
        self._joined(given)
        if self._prober is not None:
            self._prober.watch(given.name)
            log.warning("worker %s at %s joined as %s", given.name, given.url, given.role)

    def _check(self, given: WorkerPolicy) -> None:
        if given.name in self._members:
            leaves = self._members[given.name].leaves_s is not None
            text = "is still leaving: try again soon" if leaves else "is in the fleet already"
            raise ConfigError(f"a worker of the name {given.name!r} {text}", key="name")
        if len(self._members) - len(self._leaving) >= MAX_WORKERS:
            raise ConfigError(f"the fleet has {MAX_WORKERS} workers, no more are taken", key="name")
        other = self._urls.get(given.url)
        if other is not None and other not in self._leaving:
            raise ConfigError(f"worker {other} has the same url {given.url}", key="url")
        self._check_place(given)

    def _check_place(self, given: WorkerPolicy) -> None:
        dialects = self._fleet.dialects
        if given.engine not in dialects:
            known = ", ".join(sorted(dialects)) or "none"
            raise ConfigError(
                f"no plugin offers a dialect for {given.engine!r}; there are {known}", key="engine"
            )
        url = urlsplit(given.url)
        if url.port == self._policy.gateway.port and is_loopback(url.hostname or ""):
            raise ConfigError(f"port {url.port} is the gateway's own (gateway.port)", key="url")

    # Leaving

    def drain(self, name: str, draining: bool = True) -> None:
        """A worker takes nothing new, or takes requests again; it stays in the fleet.

        Raises:
            KeyError: There is no such worker.
            ConfigError: It is leaving.
        """
        if self._members[name].leaves_s is not None:
            raise ConfigError(f"worker {name} is leaving", key="drain")
        self._fleet.drain(name, draining)

    def remove(self, name: str, now_s: float, *, then: WorkerPolicy | None = None) -> None:
        """A worker drains and leaves; ``then`` joins under its name. Idempotent.

        Raises:
            KeyError: There is no such worker.
        """
        member = self._members[name]
        member.then = then
        if member.leaves_s is None:
            member.leaves_s = now_s + self._policy.gateway.drain_s
            self._leaving.add(name)
            self._fleet.drain(name)
            log.warning("worker %s drains and leaves the fleet", name)

    def sweep(self, now_s: float) -> None:
        """Let go of workers whose drain is over."""
        for name in list(self._leaving):
            left = self._fleet.states[name].requests
            leaves_s = self._members[name].leaves_s
            if left and leaves_s is not None and now_s < leaves_s:
                continue
            if left:
                log.warning("worker %s leaves with %d requests unfinished", name, left)
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        self._leaving.discard(name)
        member = self._members.pop(name)
        if self._urls.get(member.given.url) == name:
            del self._urls[member.given.url]
        if self._prober is not None:
            self._prober.forget(name)
        drain_s = self._policy.gateway.drain_s
        # Its calls end before it is forgotten: retries must see that it is there no more.
        detail = f"the worker left the fleet and had {drain_s:g} s (policy key gateway.drain_s)"
        self._pools[name].end("drained", detail)
        del self._pools[name]
        self._fleet.remove(name)
        self._gone(name)
        log.warning("worker %s left the fleet", name)
        if member.then is not None:
            try:
                self.add(member.then, by=member.by)
            except ConfigError as exc:
                log.error("worker %s does not come back: %s", name, exc)

    # Requests

    def give(self, worker: Worker, work: Work) -> tuple[WorkerPool, Work]:
        """Give work to the worker of a route; returns its connections and what to end with.

        A route may be older than the fleet. If the worker has left meanwhile, the call fails soon,
        and a later worker of the same name has nothing to do with it.
        """
        pool = self._pools.get(worker.name)
        if pool is None or pool.worker.url != worker.url or pool.worker.engine != worker.engine:
            pool = WorkerPool(worker, self._spawn, connect_s=self._policy.gateway.connect_s)
            pool.close()
            return pool, replace(work, given_to=NOT_LEFT)
        return pool, self._fleet.begin(worker.name, work)

    def announcing(self, worker: Worker) -> WorkerPool:
        """Return connections to where a worker's adapter hears announcements.

        One that has not said where, or has left, is not reached: the announcement fails soon.
        """
        address = self._fleet.announce_address(worker.name)
        teller = replace(worker, url=f"http://{address or 'unknown:1'}")
        pool = WorkerPool(teller, self._spawn, connect_s=self._policy.gateway.connect_s)
        if not address:
            pool.close()
        return pool

    # The watched file

    def follow(self, given: Sequence[WorkerPolicy], now_s: float) -> None:
        """Make the workers that the watched file brought those that it names now.

        Raises:
            ConfigError: One of them cannot join; nothing has changed then.
        """
        wanted = {worker.name: worker for worker in given}
        self._check_file(wanted)
        for name, member in list(self._members.items()):
            if member.by == "file" and name not in wanted:
                self.remove(name, now_s)
        for name, worker in wanted.items():  # who changes makes place for who joins
            known = self._members.get(name)
            if known is not None and known.leaves_s is not None:
                self.remove(name, now_s, then=worker)
            elif known is not None and worker != known.given:
                self._change(known, worker, now_s)
        for name, worker in wanted.items():
            if name not in self._members:
                self.add(worker, by="file")

    def _check_file(self, wanted: Mapping[str, WorkerPolicy]) -> None:
        for name, worker in wanted.items():
            for other in {name, self._urls.get(worker.url)}:
                known = None if other is None else self._members.get(other)
                if known is not None and known.by != "file" and known.leaves_s is None:
                    raise ConfigError(
                        f"worker {name} is in the fleet already, by the {known.by}: "
                        f"{other} at {known.given.url}"
                    )
            self._check_place(worker)
        others = sum(member.by != "file" for member in self._members.values())
        if others + len(wanted) > MAX_WORKERS:
            raise ConfigError(f"the fleet would have more than {MAX_WORKERS} workers")

    def _change(self, member: _Member, to: WorkerPolicy, now_s: float) -> None:
        was = member.given
        same = (was.url, was.engine, was.role, was.role_switch)
        if same == (to.url, to.engine, to.role, to.role_switch):
            member.given = to
            self._fleet.change(to.name, to.worker())
        else:
            self.remove(to.name, now_s, then=to)

    # Roles

    def last_of(self, name: str, role: Role) -> Role | None:
        """Return the role that would have no worker left if this one changed to ``role``."""
        view = self._fleet.view()
        for phase in (Role.PREFILL, Role.DECODE):
            serving = view.serving(phase)
            if not role.serves(phase) and serving and all(w.name == name for w in serving):
                return phase
        return None
