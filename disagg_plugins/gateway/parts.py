"""What a gateway is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.gateway.dialect import Dialect, HandoffRef
    from disagg_plugins.gateway.rebalancing import Ask
    from disagg_plugins.gateway.token_counter import TokenCounter
    from disagg_plugins.placement.types import RoleChange, RoleLoad
    from disagg_plugins.scheduling.trace import Trace
    from disagg_plugins.telemetry.records import RecordFile
    from disagg_plugins.types import Decision, FleetView, RequestProfile, Role, Worker

    Endpoints = tuple[Mapping[str, object], ...]


class Decides(Protocol):
    """What the gateway needs of the scheduler."""

    def decide(
        self, profile: RequestProfile, fleet: FleetView, trace: Trace | None = None
    ) -> Decision:
        """Return the route of a request."""
        ...

    def queue_score(self, profile: RequestProfile) -> float:
        """Return how urgent a request is that waits for a prefill worker, from 0 to 1."""
        ...

    @property
    def wants_ends(self) -> bool:
        """Whether some plugin wants to be told how requests end."""
        ...

    def request_ended(self, record: Mapping[str, object]) -> None:
        """Tell the plugins how a request ended."""
        ...


def _leave_as_it_is(fleet: FleetView, loads: Mapping[Role, RoleLoad]) -> RoleChange | None:
    return None


@dataclass(frozen=True, slots=True)
class Parts:
    """What a gateway is built from.

    Attributes:
        scheduler: Decides each route.
        dialects: By engine name.
        secret: The fleet's secret.
        mint: Makes a handoff id and its ticket for two workers; the ticket is void when the
            request's deadline, if it has one, has passed. Takes the worker's endpoints, too.
        records: Where records are written, or None.
        plugin_failures: Returns failures of plugins by name.
        rebalance: Asks the plugins for a change of roles.
        watch: The watched file of workers, absolute, or None.
        counter: Counts prompts with the model's tokenizer; None: text is estimated.
    """

    scheduler: Decides
    dialects: Mapping[str, Dialect]
    secret: bytes
    mint: Callable[[Worker, Worker, float | None, Endpoints], HandoffRef]
    records: RecordFile | None = None
    plugin_failures: Callable[[], dict[str, int]] = dict
    rebalance: Ask = _leave_as_it_is
    watch: Path | None = None
    counter: TokenCounter | None = None
