"""Carries out changes of roles: one at a time, the old role drained first, no request lost.

A worker whose server does both phases takes its new role as soon as nothing of the old one is
left. One whose server has a role at a time is told to switch when it is idle. If it does not, it
keeps its old role; if it answers neither, it rests until a probe finds it in its role again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError, TransportError
from disagg_plugins.gateway.role_loads import RoleLoads
from disagg_plugins.placement.types import RoleChange, RoleLoad
from disagg_plugins.types import FleetView, Role

if TYPE_CHECKING:
    from disagg_plugins.gateway.fleet import FleetState
    from disagg_plugins.gateway.health import Prober
    from disagg_plugins.gateway.membership import Members
    from disagg_plugins.gateway.pool import Spawn, WorkerPool
    from disagg_plugins.gateway.worker_state import WorkerState
    from disagg_plugins.policy import Policy
    from disagg_plugins.telemetry.records import RequestRecord

log = logging.getLogger(__name__)

SAMPLE_S = 1.0
"""How often the fleet is looked at: each look costs a microsecond a worker."""

WINDOW_INTERVALS = 4
"""Length of the window in intervals of judging: one burst between two looks moves nobody."""

Ask = Callable[[FleetView, Mapping[Role, RoleLoad]], RoleChange | None]


@dataclass(slots=True)
class _Move:
    """A change under way."""

    change: RoleChange
    state: WorkerState
    until_s: float
    switching: bool = False


class Rebalancer:
    """Changes roles of workers.

    Args:
        policy: The policy.
        fleet: Whose workers they are.
        members: Knows who leaves.
        pools: Connections by worker name.
        prober: Speaks with a server about its role.
        spawn: Runs a coroutine in the gateway's task group.
        ask: Asks the plugins for a change.
    """

    def __init__(
        self,
        policy: Policy,
        fleet: FleetState,
        members: Members,
        pools: Mapping[str, WorkerPool],
        prober: Prober,
        spawn: Spawn,
        ask: Ask,
    ) -> None:
        self._rules = policy.scheduler.rebalance
        self._drain_s = policy.gateway.drain_s
        self._fleet = fleet
        self._members = members
        self._pools = pools
        self._prober = prober
        self._spawn = spawn
        self._ask = ask
        self._loads = RoleLoads(max(10 * SAMPLE_S, WINDOW_INTERVALS * self._rules.every_s))
        self._move: _Move | None = None
        self._sample_at_s = 0.0
        self._judge_at_s: float | None = None
        self._held_until_s = 0.0
        self.changes = 0

    def ended(self, now_s: float, record: RequestRecord) -> None:
        """Take the end of a request."""
        if self._rules.enabled:
            self._loads.ended(now_s, record)

    def moving(self) -> dict[str, str] | None:
        """Return the change under way, for people."""
        if self._move is None:
            return None
        change = self._move.change
        return {"worker": change.worker, "role": str(change.role), "reason": change.reason}

    def tick(self, now_s: float) -> None:
        """Go on with a change, or look whether one is wanted."""
        if self._move is not None:
            self._go_on(self._move, now_s)
        if not self._rules.enabled:
            return
        if now_s >= self._sample_at_s:
            self._sample_at_s = now_s + SAMPLE_S
            self._loads.sample(now_s, self._fleet.view())
        if self._judge_at_s is None:
            self._judge_at_s = now_s + self._rules.every_s
        if now_s >= self._judge_at_s and now_s >= self._held_until_s and self._move is None:
            self._judge_at_s = now_s + self._rules.every_s
            self._judge(now_s)

    def _judge(self, now_s: float) -> None:
        change = self._ask(self._fleet.view(), self._loads.window(now_s))
        if change is None:
            return
        try:
            self.change(change, now_s)
        except ConfigError as exc:
            self._held_until_s = now_s + self._rules.hold_s
            log.warning("the proposed change of worker %s is not made: %s", change.worker, exc)

    def change(self, change: RoleChange, now_s: float) -> None:
        """Begin to change a worker's role.

        Raises:
            ConfigError: It cannot be done now; tells why.
        """
        state = self._fleet.states.get(change.worker)
        if state is None:
            raise ConfigError(f"there is no worker {change.worker!r}", key="name")
        problem = self._problem(state, change.role)
        if problem is not None:
            raise ConfigError(problem, key="role")
        name, worker = change.worker, state.worker
        log.warning(
            "worker %s goes from %s to %s: %s", name, worker.role, change.role, change.reason
        )
        self._held_until_s = now_s + self._rules.hold_s
        if Role.BOTH in (worker.role, change.role) and not worker.role_switch:
            # It takes nothing of a role that it gives up, and ends what it has, role or not.
            self._fleet.set_role(name, change.role)
            self.changes += 1
            return
        self._fleet.drain(name)
        self._move = _Move(change, state, now_s + self._drain_s)

    def _problem(self, state: WorkerState, role: Role) -> str | None:
        """Return why a worker cannot change to ``role`` now, or None."""
        worker, name = state.worker, state.worker.name
        if self._move is not None:
            return f"worker {self._move.change.worker} is changing its role: one at a time"
        if not worker.movable:
            return "only a worker declared both can change; some engines need role_switch as well"
        if worker.role is role:
            return f"it is used for {role} already"
        if worker.role_switch and role is Role.BOTH:
            return "its server has one role at a time"
        if state.draining or not state.role_known:
            return "it is draining, or the role of its server is not known"
        missing = self._members.last_of(name, role)
        return None if missing is None else f"it is the last healthy {missing} worker"

    def _is_over(self, move: _Move) -> bool:
        name = move.change.worker
        if self._fleet.states.get(name) is move.state and not self._members.of(name)[2]:
            return False
        self._move = None
        return True

    def _go_on(self, move: _Move, now_s: float) -> None:
        if move.switching or self._is_over(move):
            return
        name, worker = move.change.worker, move.state.worker
        if move.state.requests:
            if now_s >= move.until_s:
                text = "worker %s keeps its role: its requests did not end within %g s"
                log.warning(text, name, self._drain_s)
                self._end(move, now_s)
        elif worker.role_switch:
            move.switching = True
            self._fleet.switching(name)
            self._spawn(self._switch(move))
        else:
            self._fleet.set_role(name, move.change.role)
            self.changes += 1
            self._end(move, now_s)

    def _end(self, move: _Move, now_s: float) -> None:
        self._move = None
        self._held_until_s = now_s + self._rules.hold_s
        self._fleet.drain(move.change.worker, False)

    async def _switch(self, move: _Move) -> None:
        """Have the server switch; bounded by ``rebalance.switch_s``, twice where it refuses."""
        name, worker = move.change.worker, move.state.worker
        pool = self._pools[name]
        taken: Role | None = None
        problem = "the gateway is closing"
        try:
            for role in (move.change.role, worker.role):
                try:
                    await self._prober.take_role(pool, worker, role)
                except TransportError as exc:
                    problem = exc.problem
                    log.warning("worker %s does not take the role %s: %s", name, role, problem)
                else:
                    taken = role
                    break
        finally:
            if not self._is_over(move):
                self._switched(move, taken, problem)

    def _switched(self, move: _Move, taken: Role | None, problem: str) -> None:
        name = move.change.worker
        self._move = None
        if taken is None:
            self._fleet.role_is(name, False, f"the role of its server is not known: {problem}")
        else:
            self.changes += taken is move.change.role
            self._fleet.set_role(name, taken)
            self._fleet.role_is(name, True)
        self._fleet.drain(name, False)
