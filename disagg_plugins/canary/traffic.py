"""Which requests are evidence, and how they ended (sans-IO; all on the gateway's loop).

Requests enter when they arrive, each with the arm that chance gave it, and leave as outcomes in the
order of their arrival (``cohort``). With each step of the rollout a new cohort begins; what arrived
before it says nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.canary.cohort import Cohort
from disagg_plugins.canary.efficiency import Scale
from disagg_plugins.canary.metrics import OF_THE_SERVICE, Arm, Outcome, outcome_of
from disagg_plugins.canary.progress import Epoch

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord

UNKNOWN = Scale()

MOST_HELD = 100_000
"""Requests between arrival and count: 100 MB at most; more are not counted."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What is known of a request that is counted, when it arrives.

    Attributes:
        ttft_slo_s: The bound of its SLO class, or None.
        tpot_slo_s: The bound of its SLO class, or None.
        scale: Of its arm's goodput.
    """

    arm: Arm
    arrival_s: float
    stream: bool
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    scale: Scale = UNKNOWN


class Traffic:
    """The requests of one gateway that are evidence.

    Args:
        horizon_s: See ``Cohort``.
        grace_s: See ``Cohort``.
    """

    def __init__(self, horizon_s: float, grace_s: float) -> None:
        self._horizon_s, self._grace_s = horizon_s, grace_s
        self._open: dict[str, Arrived] = {}
        self._begun: set[str] = set()  # of the open ones: their end comes by itself
        self._skipped = 0
        self.counted: dict[Arm, int] = {"baseline": 0, "candidate": 0}
        self.epoch = Epoch(0, 0)
        self._cohort = self._new_cohort()

    def begin(self, epoch: Epoch) -> None:
        """A step begins: what arrives from now on belongs to it."""
        self.epoch = epoch
        self._skipped += self._cohort.skipped
        self._cohort = self._new_cohort()
        self._open.clear()
        self._begun.clear()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    @property
    def skipped(self) -> int:
        """Requests that were not counted: no room, or their id was in use."""
        return self._skipped + self._cohort.skipped

    def enter(self, name: str, arrived: Arrived) -> None:
        """Take a request in."""
        if len(self._open) >= MOST_HELD:
            self._skipped += 1
            return
        slo = arrived.ttft_slo_s is not None or arrived.tpot_slo_s is not None
        unfinished = Outcome(
            arrived.arm,
            arrived.arrival_s,
            "overdue",
            stream=arrived.stream,
            within_slo=False if slo else None,
            per_worker=arrived.scale.per_worker,
            per_cost=arrived.scale.per_cost,
        )
        if self._cohort.enter(name, unfinished):
            self._open[name] = arrived

    def began(self, name: str, arm: Arm) -> None:
        """A request goes to a worker."""
        arrived = self._open.get(name)
        if arrived is not None and arrived.arm == arm:
            self._begun.add(name)

    def settled(self, record: RequestRecord, arm: Arm) -> None:
        """A request is over; that of the other arm, which answered in its place, is not counted."""
        arrived = self._open.get(record.request_id)
        if arrived is None or arrived.arm != arm:
            return
        outcome = outcome_of(
            record,
            arm,
            arrival_s=arrived.arrival_s,
            ttft_slo_s=arrived.ttft_slo_s,
            tpot_slo_s=arrived.tpot_slo_s,
            per_worker=arrived.scale.per_worker,
            per_cost=arrived.scale.per_cost,
        )
        self._end(record.request_id, outcome)

    def refused(self, name: str, arm: Arm, status: int, now_s: float) -> None:
        """A request was refused by its arm, and went to no worker."""
        arrived = self._open.get(name)
        if arrived is None or arrived.arm != arm:
            return
        # 429 is the gateway's own here: its tenant asked for more than it may
        service = status >= 500 or (status in OF_THE_SERVICE and status != 429)
        within = False if service and arrived.ttft_slo_s is not None else None
        outcome = Outcome(
            arm,
            arrived.arrival_s,
            "error" if service else "rejected",
            e2e_s=now_s - arrived.arrival_s,
            stream=arrived.stream,
            within_slo=within,
            per_worker=arrived.scale.per_worker,
            per_cost=arrived.scale.per_cost,
        )
        self._end(name, outcome)

    def left(self, name: str, now_s: float) -> None:
        """The client went; of a request that has not begun that is the end."""
        arrived = self._open.get(name)
        if arrived is not None and name not in self._begun:
            waited_s = now_s - arrived.arrival_s
            outcome = Outcome(
                arrived.arm,
                arrived.arrival_s,
                "client_gone",
                e2e_s=waited_s,
                stream=arrived.stream,
            )
            self._end(name, outcome)

    def due(self, now_s: float) -> list[Outcome]:
        """Return the outcomes that nothing earlier holds up any more."""
        found = self._cohort.due(now_s)
        for outcome in found:
            self.counted[outcome.arm] += 1
        return found

    def _new_cohort(self) -> Cohort:
        return Cohort(self._horizon_s, grace_s=self._grace_s, most=MOST_HELD)

    def _end(self, name: str, outcome: Outcome) -> None:
        del self._open[name]
        self._begun.discard(name)
        self._cohort.end(name, outcome)
