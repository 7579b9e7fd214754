"""Move a worker from the role that has little to do to the one that has too much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.placement.types import RoleChange, RoleLoad
from disagg_plugins.types import FleetView, Role, Worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.policy import Policy

DIRECTIONS = ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL))


class Rebalance:
    """Proposes a change when one role is busier than ``high`` and the other below ``low``.

    Between the two marks nothing moves, so a change does not undo itself.
    """

    def __init__(self) -> None:
        self._high, self._low = 1.0, 0.0  # until the policy is told: nothing moves

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        rules = policy.scheduler.rebalance
        self._high, self._low = rules.high, rules.low

    @hookimpl
    def disagg_select_rebalance(
        self, fleet: FleetView, loads: Mapping[Role, RoleLoad]
    ) -> RoleChange | None:
        """See ``hookspecs.disagg_select_rebalance``."""
        for busy, idle in DIRECTIONS:
            much, little = loads[busy].utilisation, loads[idle].utilisation
            if much < self._high or little > self._low:
                continue
            worker = _spare(fleet, busy, idle)
            if worker is not None:
                reason = f"{busy} is used to {much:.0%}, {idle} to {little:.0%}"
                return RoleChange(worker.name, busy, reason)
        return None


def _spare(fleet: FleetView, busy: Role, idle: Role) -> Worker | None:
    """Return the worker that ``idle`` misses least, never its last one.

    One that has the idle role alone adds more to the busy one than one that serves both.
    """
    serving = fleet.serving(idle)
    able = [w for w in serving if w.movable and w.role is not busy]
    if len(serving) < 2 or not able:
        return None
    return min(able, key=lambda w: (w.role is Role.BOTH, fleet.load(w).requests))
