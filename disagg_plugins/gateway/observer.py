"""Who is told how the requests of one gateway ended: the evidence of a canary's arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord


class Observer(Protocol):
    """Is told of every request's end, on the gateway's loop; each call must be quick."""

    def began(self, name: str) -> None:
        """A request goes to a worker; its end is ``settled``."""
        ...

    def refused(self, name: str, status: int) -> None:
        """A request was refused before it went to any worker.

        Args:
            name: Its id.
            status: Of the answer.
        """
        ...

    def settled(self, record: RequestRecord) -> None:
        """A request is over and recorded, with what its workers reported."""
        ...
