"""The memory of a rollout: what several gateways, and one before and after a restart, share.

- **Progress** and the **log** of decisions are written together or not at all. The log only grows.
- **Evidence** is kept a gateway and an epoch. Each gateway writes its own row, in full each time,
  so writing twice counts once. A gateway that comes back takes its row over (``adopt``) and goes
  on from it; a second process of the same name is noticed, not mixed in.
- **One gateway decides at a time.** It holds a lease, which ends by itself when the gateway dies.
  Each new lease has a higher fence; a leader that slept through the end of its lease writes with a
  fence that is too low, and is refused. People's commands need no lease: every write names the
  revision it was made from, so nobody overwrites what they have not seen.
- The lease's time is the store's own: one clock for all who share it.

Every call is bounded in time, may block until then, and belongs on a thread. Its errors are
``StoreUnavailable`` and ``StoreConflict``, of which nothing was written, and ``DamagedState``. None
of them may promote; see ``keeper``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.canary.progress import Decision, Epoch, Progress

MOST_STATE_BYTES = 4 << 20
"""Of one state as JSON; the evidence of four guardrails has 27 kB."""

MOST_GATEWAYS = 256
"""Whose evidence is kept in one epoch: a bound on what a look has to read."""

MOST_DECISIONS = 1_000
"""That one reading of the log returns."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Progress as it is stored.

    Attributes:
        revision: Grows with each write; 0: nothing is stored yet.
    """

    progress: Progress
    revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to decide, until it ends by the store's clock.

    Attributes:
        gateway: Who holds it.
        fence: Grows with each holder.
        left_s: How long it lasts from now on.
    """

    gateway: str
    fence: int
    left_s: float


class Store(Protocol):
    """See the module; ``contract`` in the tests is what each store must keep to."""

    @property
    def name(self) -> str:
        """What it is called in errors; never a password."""
        ...

    def load(self) -> Stored:
        """Return the progress; a pending one of revision 0 where nothing is stored."""
        ...

    def lead(self, gateway: str, lease_s: float) -> Lease | None:
        """Take the lease, or keep it up; None while another gateway holds it."""
        ...

    def resign(self, lease: Lease) -> None:
        """Give the lease back, so that another gateway need not wait for its end."""
        ...

    def commit(
        self,
        progress: Progress,
        decisions: Sequence[Decision],
        *,
        revision: int,
        lease: Lease | None,
    ) -> int:
        """Write progress and the decisions that led there; evidence of other epochs goes.

        Args:
            progress: What holds from now on.
            decisions: New ones, in their order; the last has the number ``progress.decisions``.
            revision: Of what it was made from.
            lease: The leader's; None for a person's command.

        Returns:
            The new revision.

        Raises:
            StoreConflict: Somebody wrote meanwhile, or the lease is another gateway's.
        """
        ...

    def adopt(self, epoch: Epoch, gateway: str, writer: str) -> Mapping[str, object] | None:
        """Take a gateway's evidence over for a new process; None where there is none.

        Args:
            epoch: What it belongs to.
            gateway: Its name, the same before and after a restart.
            writer: Names this process; whoever wrote before is shut out.
        """
        ...

    def contribute(
        self, epoch: Epoch, gateway: str, writer: str, evidence: Mapping[str, object]
    ) -> None:
        """Write all that a gateway counted in an epoch, in place of what it wrote before.

        Raises:
            StoreConflict: Another process uses the gateway's name, the epoch is over, or too many
                gateways take part.
        """
        ...

    def evidence(self, epoch: Epoch) -> Mapping[str, Mapping[str, object]]:
        """Return what each gateway counted."""
        ...

    def decisions(self, *, before: int | None = None, most: int = 100) -> Sequence[Decision]:
        """Return the newest decisions, newest first; ``before``: only those of lower numbers."""
        ...

    def close(self) -> None:
        """Let go of files and connections; calling it twice is fine."""
        ...
