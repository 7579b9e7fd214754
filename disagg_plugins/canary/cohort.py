"""Outcomes in the order of arrival, none left out because it takes long (pure).

Answers that are short end first. Who counts requests as they end sees, at every early look, the
short and the quick ones: worst in the arm that hangs. Here requests enter when they arrive and
are handed on in that order, each when its outcome is known or when it has been open for the
horizon. The outcome of a request is then the same whenever somebody looks: what ended after the
horizon counts as overdue even where its end is known by then.

One cohort for both arms keeps them at the same time of day. It is not stored: requests in flight
end with the gateway that carries them, which is no fault of their arm.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_plugins.canary.metrics import Outcome


@dataclass(slots=True, eq=False)
class _Entry:
    name: str
    unfinished: Outcome
    outcome: Outcome | None = None


class Cohort:
    """The requests between their arrival and their count.

    Args:
        horizon_s: Longest time from arrival to end that is no failure: longer than the longest
            answer that is still wanted. A verdict may wait so long for the slowest request.
        grace_s: Longest time from the end of a request to ``end``, which may wait for reports.
        most: Requests held at once. Others are not counted, and ``skipped`` says how many: whether
            there is room does not depend on how a request will end, so nothing is biased by it.
    """

    def __init__(self, horizon_s: float, *, grace_s: float = 0.0, most: int) -> None:
        if not horizon_s > 0.0 or not grace_s >= 0.0 or most < 1:
            raise ValueError(f"horizon {horizon_s!r} s, grace {grace_s!r} s, {most!r} requests")
        self._horizon_s = horizon_s
        self._wait_s = horizon_s + grace_s
        self._most = most
        self._queue: deque[_Entry] = deque()
        self._open: dict[str, _Entry] = {}
        self._last_s = float("-inf")
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._queue)

    def enter(self, name: str, unfinished: Outcome) -> bool:
        """Take a request in; False where it is not counted: no room, or its name is taken.

        Args:
            name: Unique among the open ones.
            unfinished: What is counted should it never end: ``overdue``, with whatever is known on
                arrival (its arm, whether it streams, ``within_slo`` False if it has an SLO class).

        Raises:
            ValueError: It is not marked overdue, or arrived before the last one: the order is the
                point.
        """
        if unfinished.ended != "overdue":
            raise ValueError(f"the unfinished outcome of {name!r} is {unfinished.ended!r}")
        if not unfinished.arrival_s >= self._last_s:
            raise ValueError(f"{name!r} arrived at {unfinished.arrival_s!r} s, before the last one")
        if len(self._queue) >= self._most or name in self._open:
            self.skipped += 1
            return False
        self._last_s = unfinished.arrival_s
        entry = _Entry(name, unfinished)
        self._queue.append(entry)
        self._open[name] = entry
        return True

    def first_token(self, name: str, ttft_s: float) -> None:
        """Note the first token of a request, so that it keeps its TTFT if it becomes overdue."""
        entry = self._open.get(name)
        if entry is not None and ttft_s <= self._horizon_s:
            entry.unfinished = replace(entry.unfinished, ttft_s=ttft_s)

    def end(self, name: str, outcome: Outcome) -> bool:
        """Note how a request ended; False where it is unknown, or was overdue already."""
        entry = self._open.pop(name, None)
        if entry is None:
            return False
        late = outcome.e2e_s is not None and outcome.e2e_s > self._horizon_s
        if late and outcome.ttft_s is not None and outcome.ttft_s <= self._horizon_s:
            entry.unfinished = replace(entry.unfinished, ttft_s=outcome.ttft_s)
        entry.outcome = entry.unfinished if late else outcome
        return True

    def forget(self, name: str) -> None:
        """Take a request out that says nothing of its arm, such as one that was never sent."""
        entry = self._open.pop(name, None)
        if entry is not None:
            self._queue.remove(entry)

    def due(self, now_s: float) -> list[Outcome]:
        """Return, in order of arrival, the outcomes that nothing earlier holds up any more."""
        found: list[Outcome] = []
        while self._queue:
            entry = self._queue[0]
            if entry.outcome is None:
                if now_s - entry.unfinished.arrival_s < self._wait_s:
                    break
                del self._open[entry.name]
                entry.outcome = entry.unfinished
            self._queue.popleft()
            found.append(entry.outcome)
        return found
