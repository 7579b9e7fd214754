"""What a gateway is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Dialect, HandoffRef
    from disagg_plugins.gateway.token_counter import TokenCounter
    from disagg_plugins.scheduling.trace import Trace
    from disagg_plugins.telemetry.records import RecordFile
    from disagg_plugins.types import Decision, FleetView, RequestProfile, Worker


class Decides(Protocol):
    """What the gateway needs of the scheduler."""

    def decide(
        self, profile: RequestProfile, fleet: FleetView, trace: Trace | None = None
    ) -> Decision:
        """Return the route of a request."""
        ...

    @property
    def wants_ends(self) -> bool:
        """Whether some plugin wants to be told how requests end."""
        ...

    def request_ended(self, record: Mapping[str, object]) -> None:
        """Tell the plugins how a request ended."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a gateway is built from.

    Attributes:
        scheduler: Decides each route.
        dialects: By engine name.
        secret: The fleet's secret.
        mint: Makes a handoff id and its ticket for two workers.
        records: Where records are written, or None.
        plugin_failures: Returns failures of plugins by name.
        counter: Counts prompts with the model's tokenizer; None: text is estimated.
    """

    scheduler: Decides
    dialects: Mapping[str, Dialect]
    secret: bytes
    mint: Callable[[Worker, Worker], HandoffRef]
    records: RecordFile | None = None
    plugin_failures: Callable[[], dict[str, int]] = dict
    counter: TokenCounter | None = None
