"""The typed facade of the placement hooks that have a caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins.hook_calls import HookCalls, NonsenseError
from disagg_plugins.placement.types import RoleChange
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.placement.types import RoleLoad
    from disagg_plugins.types import FleetView


class PlacementHooks:
    """Asks the plugins and checks their answers; see ``hookspecs`` for each hook."""

    def __init__(self, calls: HookCalls) -> None:
        self._calls = calls

    def select_rebalance(
        self, fleet: FleetView, loads: Mapping[Role, RoleLoad]
    ) -> RoleChange | None:
        """Return the first change that a plugin proposes, or None."""

        def check(answer: object) -> RoleChange:
            if not isinstance(answer, RoleChange) or not isinstance(answer.role, Role):
                raise NonsenseError(f"answered {type(answer).__name__}, not a RoleChange")
            if fleet.worker(answer.worker) is None:
                raise NonsenseError(f"moves {answer.worker!r}, which is not in the fleet")
            return answer

        arguments = {"fleet": fleet, "loads": loads}
        found = self._calls.first("disagg_select_rebalance", check, arguments)
        return None if found is None else found[1]
